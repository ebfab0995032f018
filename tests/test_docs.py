"""Pages that name code fail here when the code has moved on."""

import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvwise.cli.main import run
from kvwise.core.method import Axis
from kvwise.methods.catalogue import built_in, parse
from kvwise.methods.page import QUESTIONS, document
from kvwise.methods.pairs import pairs

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "kvwise"
MENTION = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[a-z_0-9/]+\.py")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def defined(path: Path) -> set[str]:
    """Classes, functions and `Class.member` of a file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return names


def mentions(text: str) -> list[tuple[str, str | None]]:
    """(file, name) pairs: every name belongs to the file mentioned last before it."""
    found: list[tuple[str, str | None]] = []
    current: str | None = None
    for match in MENTION.findall(text):
        if FILE.fullmatch(match) and not match.startswith("tests/"):
            current = match
            found.append((match, None))
        elif current is not None and NAME.fullmatch(match):
            found.append((current, match))
    return found


def stale(text: str) -> list[str]:
    wrong = []
    for file, name in mentions(text):
        path = SOURCE / file
        if not path.is_file():
            wrong.append(file)
        elif name is not None and name not in defined(path):
            wrong.append(f"{file} {name}")
    return wrong


def test_every_name_on_the_way_of_one_request_exists() -> None:
    text = (ROOT / "docs" / "one-request.md").read_text()
    assert len([m for m in mentions(text) if m[1]]) > 25
    assert stale(text) == []


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert stale("see `engine/engine.py` `Engine.step_twice` and `engine/nowhere.py`") == [
        "engine/engine.py Engine.step_twice",
        "engine/nowhere.py",
    ]


# -- methods ------------------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_up_to_date() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == document(), "make it anew: python -m kvwise.methods.page > docs/methods.md"


def test_the_page_counts_what_its_tables_say() -> None:
    """Every cell of every table, read back, is the verdict of the traits; a sentence stands for its pairs."""
    page = (ROOT / "docs" / "methods.md").read_text()
    counted = re.search(r"Of (\d+) pairs \*\*(\d+)\s+are allowed\*\* and \*\*(\d+) refused", page)
    assert counted is not None
    verdicts = {(pair.first.name, pair.second.name): pair.reason for pair in pairs(built_in())}
    refused = {pair: reason for pair, reason in verdicts.items() if reason is not None}
    assert [int(number) for number in counted.groups()] == [len(verdicts), len(verdicts) - len(refused), len(refused)]
    written, listed = dict(read_pairs(page)), " ".join(page.split())
    assert all(written.get(pair) == reason for pair, reason in refused.items())
    assert all(reason is None for pair, reason in written.items() if pair not in refused)
    promised = sum(int(number) for number in re.findall(r"^All (\d+) pairs work\.$", page, re.MULTILINE))
    assert len(written) + promised == len(verdicts)
    assert all(reason in listed for reason in refused.values())


def read_pairs(page: str) -> Iterator[tuple[tuple[str, str], str | None]]:
    """((row, column), why not) of every cell of the tables of pairs."""
    part = page.split("## What composes with what")[1].split("## Traits")[0]
    listed = re.findall(r"^(\d+)\. (.*?)\.$", re.sub(r"\n {3}", " ", part), re.MULTILINE)
    reasons: dict[str, str | None] = {f"no ({number})": reason for number, reason in listed} | {"yes": None}
    for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE):
        head, _, *rows = ([cell.strip("` ") for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        for name, *cells in rows:
            yield from (((name, column), reasons[cell]) for column, cell in zip(head[1:], cells, strict=True))


def test_the_design_lists_the_methods_that_there_are() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]*\|[^|]*) \|$", design.split("## Floors")[0], re.MULTILINE))
    assert rows.keys() - {"axis"} == {axis.value for axis in Axis}
    for axis in Axis:
        question, methods = rows[axis.value].split(" | ")
        assert question == QUESTIONS[axis]
        named = re.findall(r"`(\w+)`", methods)
        assert sorted(named) == sorted(kind.name for kind in built_in() if kind.axis is axis)
        assert built_in().find(named[0]).default


def test_strategies_that_the_readme_names_can_be_built() -> None:
    table = (ROOT / "README.md").read_text().split("| strategy | keeps | frees |")[1].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert len(named) >= 8
    assert all(parse(name) for name in named)


# -- the tutorial -------------------------------------------------------------------------------------------------


BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder; modules that are imported from it go with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("newest", "use", "test_newest") or name.startswith("kvwise_methods_"):
            del sys.modules[name]


def test_the_tutorial_works_as_it_is_written(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are written and commands run from top to bottom, as a reader would."""
    outputs: list[str] = []
    ran: list[str] = []
    for language, name, body in BLOCK.findall((ROOT / "docs" / "add-a-method.md").read_text()):
        if name:
            (own_folder / name).write_text(body)
        if name in ("use.py", "test_newest.py"):
            module = importlib.import_module(name.removesuffix(".py"))
            tests = [test for test in vars(module).values() if inspect.isfunction(test) and test.__name__ != "oracle"]
            ran += [test.__name__ for test in tests if test.__module__ == "test_newest" and test() is None]
        for line in body.splitlines() if language == "console" else ():
            capsys.readouterr()
            assert run(shlex.split(line.removeprefix("$ kvwise "))) == 0, line
            outputs.append(capsys.readouterr().out)
    assert len(ran) == 3
    about, picture, study, composed, checked = outputs
    assert "keep the newest half" in about
    assert "        ████████│ 8 of " in picture
    assert "newest 25%" in study
    assert "streaming 50%" in study
    assert composed
    assert checked.count("ok  ") == 8


def test_the_tutorials_ten_lines_are_ten() -> None:
    first = next(body for _, name, body in BLOCK.findall((ROOT / "docs" / "add-a-method.md").read_text()) if name)
    lines = first[first.index("@dataclass") :].splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith('"""')]) == 10
