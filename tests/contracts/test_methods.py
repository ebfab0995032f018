"""What every method must honour, and what composes with what: run over all that the catalogue finds."""

import itertools
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch

from kvwise.core.errors import StrategyError, UsageError
from kvwise.core.method import Axis, Method, Trait
from kvwise.core.strategy import Strategy, conflict, make_strategy
from kvwise.methods.catalogue import MethodCatalogue, catalogue, parse
from kvwise.methods.encoding.base import Encoding
from kvwise.methods.loading.base import Loading
from kvwise.methods.retention.base import DecodeView, Retention
from kvwise.methods.retention.h2o import H2O
from kvwise.methods.selection.base import Selection
from tests.methods.retention_views import decode_view

METHODS = list(catalogue())
CHOSEN = [kind for kind in METHODS if not kind.default]
BASES = {Axis.RETENTION: Retention, Axis.SELECTION: Selection, Axis.ENCODING: Encoding, Axis.LOADING: Loading}
# What an option refuses where "rubbish" is as good a word as any other: which codecs there are, tiers know.
RUBBISH = {"codec": "7up", "weights": "7"}
# Another value of options that do not take any number or word.
FITTING: dict[tuple[str, str], Any] = {
    ("h2o", "layers"): "pyramid",
    ("h2o", "heads"): "adakv",
    ("hierarchical", "reader"): 4,
    ("int8", "key_bits"): 16,
    ("int8", "value_bits"): 4,
    ("kivi", "group"): 64,
    ("kivi", "residual"): 256,
    ("kvsharer", "map"): "3:1-5:2",
    ("refreekv", "ranking"): "snapkv",
    ("snapkv", "layers"): "pyramid",
    ("snapkv", "heads"): "adakv",
}


def text(message: BaseException) -> str:
    """The message of a usage error: one line."""
    line = str(message)
    assert line
    assert "\n" not in line
    return line


def whole(*methods: Any) -> str:
    """A strategy of these methods (or their texts), with the reuse of prefixes where one of them needs it."""
    lines = [getattr(method, "name", None) or str(method) for method in methods]
    kinds = [catalogue().find(line.partition("(")[0]) for line in lines]
    needed = any(Trait.NEEDS_PREFIX_KEYS in kind.traits for kind in kinds)
    return "+".join(lines + ["prefix"] * (needed and all(kind.axis is not Axis.REUSE for kind in kinds)))


BY_MASS = [kind() for kind in CHOSEN if issubclass(kind, Retention) and kind().ranks_by_mass]


@pytest.mark.parametrize("method", BY_MASS, ids=lambda method: method.name)
def test_what_ranks_by_mass_says_so_in_its_worth(method: Retention) -> None:
    """Kernels that choose by mass must choose as `worth` would."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(50, (2, 3, 2, 40), generator=generator, dtype=torch.int32)
    mass, marks = torch.rand(positions.shape, generator=generator), [7, 0]
    view = decode_view(
        positions, torch.ones_like(positions, dtype=torch.bool), [50, 45], [40, 40], mass=mass, marks=marks
    )
    last_older = torch.tensor([50 - 7 - 1, 45 - 1])[:, None, None, None]
    assert torch.equal(method.worth(view), mass.masked_fill(positions > last_older, torch.inf))


def test_some_methods_rank_by_mass() -> None:
    assert {method.name for method in BY_MASS} >= {"h2o", "less"}


def test_a_worth_of_ones_own_is_asked() -> None:
    """Whoever derives from a method that ranks by mass need not know that it does."""

    class Oldest(H2O):
        def worth(self, view: DecodeView) -> torch.Tensor:
            return view.positions.float()

    class Narrow(H2O):
        def num_recent(self, capacity: int) -> int:
            return 1

    assert not Oldest().ranks_by_mass
    assert Narrow().ranks_by_mass


@pytest.mark.parametrize("kind", METHODS, ids=lambda k: k.name)
class TestEveryMethod:
    def test_is_default_constructible_and_prints_and_parses_back(self, kind: type[Method]) -> None:
        method = kind()
        assert str(method) == kind.name
        strategy = parse(whole(kind))
        assert getattr(strategy, kind.axis.value) == method
        assert parse(str(strategy)) == strategy

    def test_says_what_it_is(self, kind: type[Method]) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", kind.name)
        assert kind.idea
        assert "\n" not in kind.idea
        assert kind.paper
        assert kind.__doc__
        assert isinstance(kind.axis, Axis)
        assert all(isinstance(trait, Trait) for trait in kind.traits)
        assert issubclass(kind, BASES.get(kind.axis, Method))

    def test_is_a_value(self, kind: type[Method]) -> None:
        assert kind() == kind()
        assert hash(kind()) == hash(kind())
        with pytest.raises((AttributeError, TypeError)):
            kind().name = "other"  # type: ignore[misc]

    def test_lives_in_the_folder_of_its_axis(self, kind: type[Method]) -> None:
        assert kind.__module__.startswith(f"kvwise.methods.{kind.axis.value}.")

    def test_every_option_is_printed_and_parsed_back(self, kind: type[Method]) -> None:
        for option in fields(kind):
            assert option.default is not MISSING, "every option has a default"
            value = FITTING.get((kind.name, option.name)) or other_value(option.default)
            method = kind.build({option.name: value})
            assert f"{option.name}=" in str(method)
            assert getattr(parse(whole(str(method))), kind.axis.value) == method

    def test_wrong_options_are_refused_in_one_line(self, kind: type[Method]) -> None:
        with pytest.raises(StrategyError, match=rf"{kind.name} has no option 'nonsense'") as caught:
            parse(f"{kind.name}(nonsense=1)")
        assert all(option.name in text(caught.value) for option in fields(kind))
        for option in fields(kind):
            with pytest.raises(StrategyError, match=option.name):
                parse(f"{kind.name}({option.name}={RUBBISH.get(option.name, 'rubbish')})")
            with pytest.raises(StrategyError, match=f"'{option.name}' is given twice"):
                parse(f"{kind.name}({option.name}=1, {option.name}=1)")

    def test_a_budget_is_above_0_and_at_most_1(self, kind: type[Method]) -> None:
        if "budget" not in {option.name for option in fields(kind)}:
            return
        for value in ("0", "1.5", "-0.1", "nan"):
            with pytest.raises(StrategyError, match=rf"{kind.name}: budget={value}.*above 0, at most 1") as caught:
                parse(f"{kind.name}(budget={value})")
            text(caught.value)
        assert parse(f"{kind.name}(budget=1)")

    def test_a_retention_that_keeps_all_says_so(self, kind: type[Method]) -> None:
        if not issubclass(kind, Retention) or "budget" not in {option.name for option in fields(kind)}:
            return
        assert not kind.build({"budget": 1}).drops
        assert kind.build({"budget": 0.99}).drops

    def test_a_retention_with_a_limit_keeps_at_least_a_token(self, kind: type[Method]) -> None:
        if not issubclass(kind, Retention) or kind().capacity(1) is None:
            return
        for num_tokens in (1, 2, 7, 100, 10_000):
            assert 1 <= kind.build({"budget": 0.001}).capacity(num_tokens) <= max(10, num_tokens)


def other_value(default: Any) -> Any:
    """A value of the same kind that no method refuses."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return 0.37
    if isinstance(default, str):
        return {"raw": "int8", "paper": "released", "cache": "original", "auto": "untrained"}[default]
    return (default or 0) + 1


def test_every_axis_has_exactly_one_default() -> None:
    for axis in Axis:
        assert sum(kind.default for kind in METHODS if kind.axis is axis) == 1
    assert str(parse("full")) == "full"
    assert all(method.default for method in parse("full").methods())


def test_the_methods_of_the_study_are_there() -> None:
    names = {kind.name for kind in METHODS}
    assert {"full", "prefix", "streaming", "h2o", "infinigen"} <= names
    assert {"compute", "load", "cake", "layerwise", "cachegen"} <= names


# -- pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CHOSEN, 2)), ids=lambda k: k.name)
def test_a_pair_is_built_or_refused_with_a_reason_that_names_both(first: type[Method], second: type[Method]) -> None:
    line = whole(first, second)
    together = [catalogue().find(name) for name in line.split("+")]
    clashing = [(a, b) for a, b in itertools.combinations(together, 2) if clash(a.traits, b.traits)]
    for a, b in itertools.combinations(together, 2):
        assert (conflict(a(), b()) is None) == (conflict(b(), a()) is None)
        if a.axis is not b.axis:
            assert (conflict(a(), b()) is not None) == ((a, b) in clashing)
    if first.axis is second.axis:
        refused = rf"{first.name} and {second.name} both answer '{first.axis}'"
    elif clashing:
        pairs = "|".join(f"{a.name} and {b.name}|{b.name} and {a.name}" for a, b in clashing)
        refused = rf"({pairs}) cannot work together: .{{20,}}"
    else:
        assert parse(str(parse(line))) == parse(line)
        return
    with pytest.raises(StrategyError, match=refused) as caught:
        parse(line)
    text(caught.value)


def clash(first: frozenset[Trait], second: frozenset[Trait]) -> bool:
    """What cannot be, said once more and independently of the table in core."""
    ranks_and_skips = {Trait.NEEDS_EVERY_ROW, Trait.SKIPS_ROWS} <= first | second
    looks_up_nothing = {Trait.NEEDS_PREFIX_KEYS, Trait.NO_PREFIX_KEYS} <= first | second
    turns_what_is_packed = {Trait.REPOSITIONS, Trait.PACKS} <= first | second
    folds_half_a_key = {Trait.FOLDS, Trait.PRUNES_CHANNELS} <= first | second
    not_to_be_recalled = {
        Trait.LIVES_ON, Trait.RAGGED_HEADS, Trait.PACKS, Trait.SHARES_LAYERS, Trait.REPOSITIONS,
    } & (first | second)  # fmt: skip
    cannot_recall = Trait.RECALLS in first | second and not_to_be_recalled
    two_owners = Trait.OWNS_PAGES in first and Trait.OWNS_PAGES in second
    return any((ranks_and_skips, looks_up_nothing, turns_what_is_packed, folds_half_a_key, cannot_recall, two_owners))


@pytest.mark.parametrize("name", [kind.name for kind in METHODS if Trait.NEEDS_PREFIX_KEYS in kind.traits])
def test_loading_without_prefixes_is_refused_with_the_way_out(name: str) -> None:
    for line in (name, f"none+{name}", f"{name}+none", f"streaming+{name}"):
        with pytest.raises(StrategyError, match=rf"none and {name} cannot work together: .*add '\+prefix'") as caught:
            parse(line)
        assert "the first" not in text(caught.value)
    assert parse(f"{name}+prefix") == parse(f"prefix+{name}")


@pytest.mark.parametrize(
    ("line", "works"),
    [
        ("h2o+prefix", False),
        ("prefix+h2o(budget=0.5)", False),
        ("streaming+prefix", True),
        ("infinigen+prefix", True),
        ("h2o+infinigen", True),
        ("streaming+infinigen+prefix", True),
        ("h2o(layers=pyramid)+topk", True),
        ("h2o(heads=adakv)+topk", False),
        ("h2o+topk+int4", False),
        ("less+topk", False),
        ("corm+quest", False),
        ("kvmerger+clusterkv", False),
        ("cascading+infinigen", False),
        ("snapkv+prefix", True),
        ("snapkv(layers=pyramid, heads=adakv)+prefix", True),
        ("corm+prefix", True),
        ("vlcache+prefix", True),
        ("refreekv+prefix", True),
        ("refreekv(ranking=h2o)+prefix", False),
        ("h2o(normalised=true)+prefix", False),
        ("window+prefix", True),
        ("random+prefix", True),
        ("topk+prefix", True),
        ("snapkv+topk", True),
        ("random+topk", True),
        ("full+prefix", True),
        ("full+infinigen", True),
        ("cake+prefix", True),
        ("streaming+prefix+cake(codec=int8)", True),
        ("infinigen+prefix+layerwise", True),
        ("h2o+prefix+cake", False),
        ("cake", False),
        ("compute", True),
    ],
)
def test_pairs_that_were_thought_through(line: str, works: bool) -> None:
    if works:
        assert parse(line)
        return
    with pytest.raises(StrategyError, match="cannot work together"):
        parse(line)


# -- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("h20", "unknown method 'h20'; did you mean 'h2o'?"),
        ("streamin(budget=0.5)", "did you mean 'streaming'?"),
        ("zzzzzz", "unknown method 'zzzzzz' (known: all, "),
        ("", "is no strategy"),
        ("   ", "is no strategy"),
        ("h2o+", "is no strategy"),
        ("+h2o", "is no strategy"),
        ("h2o++prefix", "is no strategy"),
        ("h2o(budget=0.2", "is no method"),
        ("h2o)", "is no method"),
        ("h2o(budget)", "'budget' is no option; write option=value"),
        ("h2o(budget=)", "is no option"),
        ("h2o(=0.2)", "is no option"),
        ("h2o(budget=0.2;recent=0.1)", "budget"),
        ("h2o(budget=0.2 recent=0.1)", "is no option"),
        ("h2o(budget=true)", "budget=True must be a number"),
        ("h2o(budget=1.5)", "h2o: budget=1.5 is out of range: it must be above 0, at most 1"),
        ("h2o(recent=-0.1)", "recent=-0.1 is out of range"),
        ("streaming(sinks=1.5)", "sinks=1.5 must be a whole number"),
        ("streaming(window=0)", "window=0 is out of range"),
        ("infinigen(alpha=-1)", "alpha=-1 is out of range"),
        ("infinigen(ratio=0)", "ratio=0 is out of range"),
        ("h2o(budget=0.2)+h2o(budget=0.3)", "h2o and h2o both answer 'retention'"),
        ("full+streaming", "full and streaming both answer 'retention'"),
        ("prefix(x=1)", "prefix has no option 'x'; its options: none"),
        ("prefix+cake(chunk=0)", "cake: chunk=0 is out of range: it must be at least 1"),
        ("prefix+cake(codec=3)", "cake: codec=3 must be a word"),
        ("prefix+load(codec=Raw)", "codec=Raw is out of range: it must be the name of a codec, such as raw or int8"),
        ("prefix+load(min_tokens=-1)", "min_tokens=-1 is out of range"),
        ("prefix+layerwise(look_ahead=-1)", "look_ahead=-1 is out of range"),
        ("prefix+cachegen(mode=other)", "cachegen: mode=other is out of range: it must be one of paper, released"),
        ("prefix+cachegen(ttft_ms=0)", "ttft_ms=0 is out of range: it must be above 0"),
        ("prefix+cachegen(levels=0)", "levels=0 is out of range"),
        ("prefix+load+cake", "load and cake both answer 'loading'"),
        ("h2o(\n)", "is no method"),
        ("h2o, prefix", "is no method"),
    ],
)
def test_texts_that_are_no_strategy(line: str, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        parse(line)
    assert message in text(caught.value)
    assert isinstance(caught.value, UsageError)


def test_white_space_and_order_do_not_matter() -> None:
    one = parse("streaming(budget=0.3, sinks=2)+prefix")
    assert one == parse("  prefix +  streaming( sinks = 2 ,budget=0.30 ) ")
    assert str(one) == "streaming(budget=0.3, sinks=2)+prefix"


def test_a_catalogue_refuses_two_methods_of_one_name() -> None:
    kind = METHODS[0]
    impostor = type("Impostor", (kind,), {})
    with pytest.raises(StrategyError, match=f"two methods are called {kind.name!r}"):
        MethodCatalogue([kind, impostor])
    assert list(MethodCatalogue([kind, kind])) == [kind]


def test_a_method_on_a_wrong_axis_is_refused() -> None:
    methods = {axis.value: catalogue().default(axis) for axis in Axis}
    with pytest.raises(StrategyError, match="prefix answers reuse, not retention"):
        Strategy(**{**methods, "retention": parse("prefix").reuse})


def test_what_is_not_chosen_has_its_default() -> None:
    h2o = parse("h2o").retention
    assert make_strategy({Axis.RETENTION: h2o}, catalogue()) == parse("h2o")
