"""`kvwise methods`, and methods of one's own on the command line: `--methods`, its environment, and what is refused."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from kvwise.cli.main import run
from kvwise.core.method import Axis, Trait
from kvwise.core.strategy import conflict
from kvwise.methods.catalogue import built_in, catalogue
from kvwise.methods.page import document
from kvwise.study.plan import read_plan
from kvwise.study.workbench import Workbench

MINE = '''
from dataclasses import dataclass
from kvwise.core.method import Trait
from kvwise.methods.retention.window import Window

@dataclass(frozen=True)
class Mine(Window):
    """All there is to say of mine."""
    name, idea = "{name}", "the newest, once more"
    strength: float = 0.5
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(name="mine"))
    return path


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 0
    return capsys.readouterr().out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("kvwise: ")
    return line


def test_the_list_has_all_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(["methods"], capsys)
    parts = {part.split(" ")[0]: part for part in out.split("\n\n")}
    for axis in Axis:
        assert f"\n{axis.value}: " in "\n" + out
    for kind in catalogue():
        part = parts[kind.name]
        assert kind.idea in part
        assert kind.paper in part
        assert all(f"{option.name}=" in part for option in fields(kind))
        assert all(trait.value in part for trait in kind.traits)
        assert ("(default)" in part.splitlines()[0]) == kind.default
    assert "but" in parts["h2o"].splitlines()[-1]
    assert "prefix" in parts["h2o"].splitlines()[-1]


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(["methods", "h2o"], capsys)
    assert "budget=0.2 (float)" in out
    assert "not with prefix" in out.replace("cascading, ", "")
    assert "h2o ranks tokens by the attention of every prompt row, and rows of reused tokens" in out
    assert "Heavy-Hitter Oracle" in out
    assert printed(["methods", "prefix"], capsys).count("the other ranks tokens") == 1
    assert "did you mean 'h2o'" in refused(["methods", "h20"], capsys)


def test_json_says_what_composes(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {one["name"]: one for one in json.loads(printed(["methods", "--json"], capsys))}
    assert facts.keys() == {kind.name for kind in catalogue()}
    for kind in catalogue():
        for other in catalogue():
            works, fails = (other.name in facts[kind.name][key] for key in ("works_with", "refused_with"))
            if other.axis is kind.axis:
                assert not works
                assert not fails
            else:
                assert works == (conflict(kind(), other()) is None)
                assert fails == (not works)
    one = json.loads(printed(["methods", "streaming", "--json"], capsys))
    assert one == facts["streaming"]
    assert one["options"] == {"budget": 0.2, "sinks": 4, "window": None}
    assert one["needs"]["OWNS_PAGES"] == Trait.OWNS_PAGES.value


def test_markdown_is_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["methods", "--markdown"], capsys) == document(catalogue())
    assert "leave out" in refused(["methods", "--markdown", "--json"], capsys)
    assert "leave out" in refused(["methods", "h2o", "--markdown"], capsys)


def test_own_methods_are_listed_with_the_others(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--methods", str(mine), "methods"]
    assert "the newest, once more" in printed(given, capsys)
    assert "All there is to say of mine." in printed([*given, "mine"], capsys)
    assert "| `mine` |" in printed([*given, "--markdown"], capsys)
    assert "mine" not in {kind.name for kind in catalogue()}
    assert "unknown method 'mine'" in refused(["methods", "mine"], capsys)


def test_own_methods_generate(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "--model", "random:llama-tiny", "--prompt", "x" * 40, "--max-tokens", "3", "--ignore-eos"]
    lines = []
    for strategy in ("mine(budget=0.5)+prefix", "window(budget=0.5)+prefix"):
        lines.append(printed(["--methods", str(mine), *given, "--strategy", strategy, "--json"], capsys))
    own, window = map(json.loads, lines)
    assert own["attestation"]["strategy"] == "mine(budget=0.5)+prefix"
    assert own["attestation"]["tokens_dropped"] == window["attestation"]["tokens_dropped"] > 0
    assert own["token_ids"] == window["token_ids"]
    assert "strength=none must be" in refused(
        ["--methods", str(mine), *given, "--strategy", "mine(strength=none)"], capsys
    ).replace("None", "none")


def test_the_environment_and_what_comes_first(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.py"
    other.write_text(MINE.format(name="other"))
    monkeypatch.setenv("KVWISE_METHODS", f"{mine}:{other}")
    assert printed(["methods", "other"], capsys)
    assert printed(["methods", "mine"], capsys)
    assert printed(["--methods", str(mine), "methods", "mine"], capsys)
    assert "unknown method 'other'" in refused(["--methods", str(mine), "methods", "other"], capsys)
    monkeypatch.setenv("KVWISE_METHODS", "")
    assert "unknown method 'mine'" in refused(["methods", "mine"], capsys)


def test_several_files(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.py"
    other.write_text(MINE.format(name="other"))
    names = printed(["--methods", str(mine), "--methods", str(other), "methods", "--json"], capsys)
    assert {"mine", "other"} <= {one["name"] for one in json.loads(names)}
    other.write_text(MINE.format(name="mine"))
    line = refused(["--methods", str(mine), "--methods", str(other), "methods"], capsys)
    assert "other.py: a method of" in line
    assert "give yours another name" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def", "mine.py, line 1: SyntaxError"),
        ("\n1 / 0\n", "mine.py, line 2: ZeroDivisionError"),
        ("x = 1", "defines no method"),
        (MINE.format(name="snapkv"), "is called 'snapkv' already"),
    ],
)
def test_files_that_are_broken(mine: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    mine.write_text(text)
    for command in (["methods"], ["generate", "--model", "random:3m", "--prompt", "x"]):
        assert words in refused(["--methods", str(mine), *command], capsys)
    assert "No such file" in refused(["--methods", str(mine.parent / "no.py"), "methods"], capsys)


def test_a_study_names_the_file(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.toml"
    text = """
        methods = [{methods}]
        [[block]]
        name = "b"
        strategies = ["full", "mine(budget={{budget}})"]
        budgets = [0.5]
        models = ["random:3m"]
        workload = {{ kind = "random" }}
    """
    plan.write_text(text.format(methods=json.dumps(str(mine))))
    facts = json.loads(printed(["study", "plan", str(plan), "--json"], capsys))
    assert "mine(budget=0.5)" in {cell["strategy"] for cell in facts["cells"]}
    assert str(mine) in printed(["study", "plan", str(plan)], capsys)
    bench = Workbench(read_plan(plan))
    bench.check_strategy("mine(budget=0.5)+prefix")
    assert bench.idle_methods("mine(budget=0.5)+prefix", {}, 0) == ("mine", "prefix")
    plan.write_text(text.format(methods=""))
    assert "unknown method 'mine'" in refused(["study", "plan", str(plan)], capsys)
    assert printed(["--methods", str(mine), "study", "plan", str(plan)], capsys)
    plan.write_text(text.format(methods='"no.py"'))
    assert "no.py: No such file" in refused(["study", "plan", str(plan)], capsys)
    assert "no.py: No such file" in refused(["study", "run", str(plan), "-o", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_check(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(["--methods", str(mine), "methods", "mine(budget=0.4)", "--check"], capsys)
    assert all(line.startswith("ok  ") for line in out.splitlines())
    assert len(out.splitlines()) == 8
    mine.write_text(MINE.format(name="mine") + "    def keep(self, view):\n        return None\n")
    line = refused(["--methods", str(mine), "methods", "mine", "--check"], capsys)
    assert "mine: broken promise: " in line
    assert "--check runs one method" in refused(["methods", "--check"], capsys)


def test_the_page_is_of_the_package_alone(mine: Path) -> None:
    from kvwise.methods.catalogue import using

    with using(mine):
        assert document() == document(built_in())
        assert "mine" not in document()
