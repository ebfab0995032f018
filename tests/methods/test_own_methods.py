"""Methods of a user's own: read from files and modules, refused in one line where they are not sound, and tried."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch

from kvwise.core.errors import StrategyError
from kvwise.core.method import Method, Trait
from kvwise.core.strategy import conflict
from kvwise.methods import catalogue as catalogues
from kvwise.methods.catalogue import MethodCatalogue, built_in, catalogue, installed, parse, using
from kvwise.methods.own import faults, needed_traits, read_methods
from kvwise.methods.pairs import pairs, pairs_of
from kvwise.methods.retention.base import Kept, uniform
from kvwise.methods.retention.streaming import Streaming
from kvwise.methods.retention.window import Window
from kvwise.testing import check_method, kept_positions, prompt_view, random_prompt

HEAD = """
from dataclasses import dataclass
from kvwise.core.method import Axis, Method, Trait
from kvwise.methods.encoding.base import Encoding
from kvwise.methods.retention.base import Retention, uniform
from kvwise.methods.selection.base import Selection
"""
MINE = (
    HEAD
    + """
@dataclass(frozen=True)
class Mine(Retention):
    name, idea, paper = "mine", "the newest", "- (mine)"
    traits = frozenset({Trait.OWNS_PAGES, Trait.PRIVATE})
    budget: float = 0.5

    def capacity(self, num_prompt_tokens):
        return max(1, int(num_prompt_tokens * self.budget))

    def keep(self, view):
        return uniform(view, (view.positions >= view.num_tokens - view.capacity).expand(*view.shape, -1))

    def worth(self, view):
        return view.positions.float()
"""
)


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`write(text)` makes a file of methods; what it leaves in `sys.modules` goes with the test."""

    def make(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        if name.startswith(("kvwise_methods_", "mine")):
            del sys.modules[name]


def one_line(caught: Any) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_file_is_known_inside_using_and_nowhere_else(write: Callable[..., Path]) -> None:
    path = write(MINE)
    before = {kind.name for kind in catalogue()}
    with using(path) as known:
        assert known is catalogue()
        assert {kind.name for kind in catalogue()} == before | {"mine"}
        strategy = parse("mine(budget=0.25)+prefix")
        assert parse(str(strategy)) == strategy
        other: list[bool] = []
        thread = Thread(target=lambda: other.append("mine" in {kind.name for kind in catalogue()}))
        thread.start()
        thread.join()
        assert other == [False]
    assert {kind.name for kind in catalogue()} == before
    with pytest.raises(StrategyError, match="unknown method 'mine'"):
        parse("mine")


def test_what_raises_inside_using_takes_the_methods_along(write: Callable[..., Path]) -> None:
    with pytest.raises(ZeroDivisionError), using(write(MINE)):
        raise ZeroDivisionError
    assert catalogue() is installed()


def test_two_files_and_one_inside_the_other(write: Callable[..., Path]) -> None:
    other = write(MINE.replace('"mine", "the', '"other", "the'), "other.py")
    with using(write(MINE)), using(other):
        assert parse("mine").retention != parse("other").retention
    with using(write(MINE), other):
        assert parse("mine").retention != parse("other").retention


def test_the_same_file_twice_is_the_same_class_and_an_edited_one_is_another(write: Callable[..., Path]) -> None:
    path = write(MINE)
    assert read_methods(path) == read_methods(str(path))
    with using(path, path), using(path):
        assert str(parse("mine")) == "mine"
    (first,) = read_methods(path)
    (second,) = read_methods(write(MINE.replace("= 0.5", "= 0.25")))
    assert first is not second
    assert first() != second()
    assert second().budget == 0.25  # type: ignore[attr-defined]


def test_a_module_that_can_be_imported(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(MINE, "mine_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with using("mine_module"):
        assert parse("mine(budget=0.1)")
    with pytest.raises(StrategyError, match=r"no_such_module: ModuleNotFoundError.*name a file") as caught:
        read_methods("no_such_module")
    one_line(caught)


def test_helpers_and_imported_methods_are_none_of_the_file(write: Callable[..., Path]) -> None:
    text = MINE.replace("(Retention)", "(Base)").replace("@data", "class Base(Retention):\n    pass\n\n@data")
    kinds = read_methods(write("from kvwise.methods.retention.h2o import H2O\n" + text))
    assert [kind.name for kind in kinds] == ["mine"]


def test_annotations_that_are_text(write: Callable[..., Path]) -> None:
    """`from __future__ import annotations`: dataclasses look a class's module up by its name."""
    path = write(
        "from __future__ import annotations\nfrom typing import ClassVar\n" + MINE + "    x: ClassVar[int] = 3\n"
    )
    with using(path):
        assert [option for option in type(parse("mine").retention).__dataclass_fields__ if option == "budget"]
        assert "x" not in str(parse("mine(budget=0.3)"))


BROKEN = {
    "syntax": ("x = (\n", "mine.py, line 1: SyntaxError"),
    "raises": ("import math\n\nmath.sqrt(-1)\n", "mine.py, line 3: ValueError: math domain error"),
    "exits": ("raise SystemExit(0)\n", "mine.py, line 1: SystemExit: 0"),
    "imports": ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    "empty": ("", "mine.py defines no method"),
    "nameless": (MINE.replace("name, idea, paper =", "_a, idea, paper ="), "mine.py defines no method"),
    "no dataclass": (MINE.replace("@dataclass(frozen=True)\n", ""), "put @dataclass(frozen=True) above it"),
    "not frozen": (MINE.replace("(frozen=True)", ""), "cannot inherit non-frozen dataclass"),
    "no idea": (MINE.replace("name, idea, paper =", "name, _, paper ="), "must say its idea, in one line"),
    "no paper": (MINE.replace("name, idea, paper =", "name, idea, _ ="), "must say its paper"),
    "long idea": (MINE.replace("the newest", r"the\nnewest"), "must say its idea, in one line"),
    "odd name": (MINE.replace('"mine", ', '"My Method", '), "is called 'My Method'"),
    "traits": (MINE.replace("frozenset({", "list({"), "must have a frozenset of Trait"),
    "abstract": (MINE.replace("def keep", "def keeps"), "must define keep"),
    "no default": (MINE.replace("budget: float = 0.5", "budget: float"), "give every option a default"),
    "bad default": (
        MINE.replace("    def cap", "    def __post_init__(self):\n        1 / 0\n\n    def cap"),
        "ZeroDivision",
    ),
    "taken": (MINE.replace('"mine", ', '"h2o", '), "mine.py: a method of kvwise.methods.retention.h2o is called 'h2o'"),
    "default": (MINE + "    default = True\n", "mine says it is the default, and retention has one"),
    "seam": (MINE.replace("(Retention)", "(Method)") + "    axis, drops = Axis.RETENTION, False\n", "from Retention"),
    "shares pages": (MINE.replace("{Trait.OWNS_PAGES, Trait.PRIVATE}", "{Trait.PRIVATE}"), "must declare OWNS_PAGES"),
    "mass": (MINE + "    needs_mass = True\n", "must declare NEEDS_EVERY_ROW"),
    "merges": (MINE + "    merges = True\n", "must declare LIVES_ON"),
    "rows": (MINE + "    def observed_rows(self, n, spans=()):\n        return 4\n", "must declare NEEDS_LAST_ROWS"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_not_sound_is_refused_in_one_line(fault: str, write: Callable[..., Path]) -> None:
    text, words = BROKEN[fault]
    path = write(text)
    modules = set(sys.modules)
    with pytest.raises(StrategyError) as caught:
        catalogue().reading(path)
    line = one_line(caught)
    assert words in line
    assert "mine.py" in line
    if fault in ("syntax", "raises", "exits", "imports"):
        assert not {name for name in set(sys.modules) - modules if name.startswith("kvwise_methods_")}
    assert catalogue() is installed()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.py", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(StrategyError, match=words) as caught:
            read_methods(path)
        assert "name a file such as my.py" in one_line(caught)
    (tmp_path / "notes.txt").write_text("x = 1")
    with pytest.raises(StrategyError, match=r"no Python file; name one that ends in \.py"):
        read_methods(tmp_path / "notes.txt")


def test_entry_points_of_packages(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (mine,) = read_methods(write(MINE))

    class Point:
        name, value = "mine", "mine:Mine"

        def __init__(self, found: object) -> None:
            self._found = found

        def load(self) -> object:
            if isinstance(self._found, Exception):
                raise self._found
            return self._found

    found: list[Any] = [mine]
    monkeypatch.setattr(catalogues, "entry_points", lambda group: [Point(one) for one in found])
    catalogues.installed.cache_clear()
    try:
        assert "mine" in {kind.name for kind in catalogue()}
        assert "mine" not in {kind.name for kind in built_in()}
        for wrong, words in ((int, "is no method"), (ImportError("no such thing"), "'mine' .* does not load: no such")):
            found[:] = [wrong]
            catalogues.installed.cache_clear()
            with pytest.raises(StrategyError, match=words):
                catalogue()
    finally:
        monkeypatch.undo()
        catalogues.installed.cache_clear()


@pytest.mark.parametrize("kind", list(built_in()), ids=lambda kind: kind.name)
def test_the_methods_of_the_package_are_held_to_the_same(kind: type[Method]) -> None:
    assert list(faults(kind)) == []
    assert needed_traits(kind()) <= kind().traits


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_different_axes_each_once() -> None:
    kinds = list(built_in())
    found = pairs(kinds)
    assert len(found) == sum(a.axis is not b.axis for i, a in enumerate(kinds) for b in kinds[:i])
    assert len({frozenset((pair.first, pair.second)) for pair in found}) == len(found)
    for pair in found:
        assert pair.reason == conflict(pair.first(), pair.second())
    assert sum(len(pairs_of(kind, kinds)) for kind in kinds) == 2 * len(found)


def test_a_method_of_ones_own_is_judged_by_its_traits(write: Callable[..., Path]) -> None:
    with using(write(MINE.replace("PRIVATE}", "PRIVATE, Trait.NEEDS_EVERY_ROW}"))) as known:
        (pair,) = (
            pair for pair in pairs_of(known.find("mine"), known) if "prefix" in (pair.first.name, pair.second.name)
        )
        assert pair.reason is not None
        assert pair.told_to(known.find("mine")).startswith("mine ranks tokens by the attention of every prompt row")
        with pytest.raises(StrategyError, match="mine and prefix cannot work together"):
            parse("mine+prefix")


# -- promises ---------------------------------------------------------------------------------------------------------


def test_a_sound_method_keeps_every_promise(write: Callable[..., Path]) -> None:
    (mine,) = read_methods(
        write(MINE.replace("    def cap", "    drops = property(lambda self: self.budget < 1)\n    def cap"))
    )
    with pytest.raises(AssertionError, match=r"it takes budget=0.0"):
        check_method(mine)
    kept = check_method(Window(budget=0.3))
    assert len(kept) == 8
    assert "At a budget of 1 the answers are those of the full cache" in kept


@dataclass(frozen=True)
class Forgetful(Window):
    """Drops the newest token, which the next one is written over."""

    name: ClassVar[str] = "forgetful"
    idea: ClassVar[str] = "lose the newest"

    def worth(self, view: Any) -> Any:
        return -view.positions.float()


@dataclass(frozen=True)
class Hoarder(Window):
    """Goes on to hold more than it said."""

    name: ClassVar[str] = "hoarder"
    idea: ClassVar[str] = "keep more than it may"

    def keep(self, view: Any) -> Any:
        kept = super().keep(view)
        return Kept(kept.mask, torch.full_like(kept.limit, 10_000))


@dataclass(frozen=True)
class Fickle(Window):
    """Keeps something else whenever it is asked."""

    name: ClassVar[str] = "fickle"
    idea: ClassVar[str] = "keep at random, without a seed"

    def keep(self, view: Any) -> Any:
        best = torch.rand(*view.shape, view.num_tokens, generator=_RANDOM).topk(view.capacity, dim=-1).indices
        return uniform(view, torch.zeros(*view.shape, view.num_tokens, dtype=torch.bool).scatter_(-1, best, True))


@dataclass(frozen=True)
class Stubborn(Window):
    """Drops at a budget of 1 too."""

    name: ClassVar[str] = "stubborn"
    idea: ClassVar[str] = "never keep all"

    @property
    def drops(self) -> bool:
        return True

    def capacity(self, num_prompt_tokens: int) -> int | None:
        return max(1, int(num_prompt_tokens * self.budget * 0.5))


@dataclass(frozen=True)
class Raising(Window):
    """Raises on short prompts."""

    name: ClassVar[str] = "raising"
    idea: ClassVar[str] = "divide by zero"

    def keep(self, view: Any) -> Any:
        return super().keep(view) if view.num_tokens > 1 else 1 // 0


_RANDOM = torch.Generator().manual_seed(0)
BREAKS = {
    Forgetful: "the newest token has left",
    Hoarder: "tokens are held on average, and the capacity is",
    Fickle: "logits differ",
    Stubborn: "At a budget of 1",
    Raising: "ZeroDivisionError|integer (division|modulo)",
}


@pytest.mark.parametrize("kind", BREAKS, ids=lambda kind: kind.name)
def test_a_broken_promise_is_found_and_named(kind: type[Method]) -> None:
    with pytest.raises(AssertionError, match=rf"^{kind.name}: broken promise: .*({BREAKS[kind]})"):
        check_method(kind)


def test_a_name_that_is_taken_is_replaced_only_inside_the_check() -> None:
    impostor = type("Impostor", (Window,), {"name": "h2o"})
    with pytest.raises(StrategyError):
        MethodCatalogue([*built_in(), impostor])


def test_what_was_kept_is_what_the_oracle_says() -> None:
    prompt = random_prompt(50)
    assert prompt == random_prompt(50)
    layers = kept_positions(Streaming(budget=0.2, sinks=3), prompt, 5)
    assert layers == [[[0, 1, 2, *range(47, 54)]] * len(layers[0])] * len(layers)


def test_views_that_are_made_up_add_up() -> None:
    from kvwise.methods.retention.h2o import H2O
    from kvwise.methods.retention.snapkv import SnapKV

    view = prompt_view(H2O(budget=0.5), 30, shape=(3, 2), group=4)
    assert view.mass is not None
    assert torch.allclose(view.mass.sum(-1), torch.full((3, 2), 30.0 * 4))
    assert H2O(budget=0.5).keep(view).mask.sum(-1).unique().tolist() == [15]
    rows = prompt_view(SnapKV(budget=0.9, observed=8), 30).rows(1)
    assert rows.shape == (2, 2, 8, 30)
    assert torch.allclose(rows.sum(-1), torch.ones(2, 2, 8))
    assert Trait.NEEDS_LAST_ROWS in SnapKV().traits
