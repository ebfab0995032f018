"""`kvwise study`: plans printed, folders reported and compared, bad usage in one line and exit 2 with nothing lost."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest

from kvwise.cli.main import run
from kvwise.study.built_in import default_plan, methods_plan, paper_plan, quality_plan
from kvwise.study.overrides import Overrides
from kvwise.study.plan import Plan, read_plan, read_plan_text
from kvwise.tasks.catalogue import tasks
from tests.study.conftest import make_plan, run_fake

SMALL = """
[[block]]
name = "b"
strategies = ["full", "h2o(budget={budget})"]
budgets = [0.2]
models = ["random:3m"]
request_rates = [4.0, 16.0]
context_lengths = [64]
quality = false
[block.workload]
kind = "random"
[block.load]
max_requests = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "out"
    run_fake(make_plan(SMALL), path)
    return path


def test_plan_prints_the_default_plan_to_edit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "plan"]) == 0
    captured = capsys.readouterr()
    assert read_plan_text(captured.out, "printed") == default_plan()
    assert "cells" in captured.err


def test_plan_prints_the_quality_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "plan", "--quality-only"]) == 0
    captured = capsys.readouterr()
    assert read_plan_text(captured.out, "printed") == quality_plan()
    assert "recall" in captured.out


def test_quality_only_leaves_the_traffic_out_of_any_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.toml").write_text(SMALL.replace("quality = false", ""))
    kinds = []
    for options in ([], ["--quality-only"]):
        assert run(["study", "plan", str(tmp_path / "p.toml"), "--json", *options]) == 0
        kinds.append({c["kind"] for c in json.loads(capsys.readouterr().out)["cells"]})
    assert kinds == [{"quality", "live"}, {"quality"}]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were to be run; nothing is."""
    plans: list[Plan] = []
    monkeypatch.setattr("kvwise.cli.study._run", lambda plan, *_, **__: plans.append(plan))
    return plans


def test_which_plan_runs(ran: list[Plan], tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(SMALL)
    file = str(tmp_path / "p.toml")
    assert run(["study"]) == 0
    assert run(["study", "--quality-only"]) == 0
    assert run(["study", "run", "--quality-only"]) == 0
    assert run(["study", "run", file, "--quality-only", "--min-quality", "0.9"]) == 0
    only = {"quality_only": True}
    assert ran[:3] == [default_plan(), quality_plan().model_copy(update=only), quality_plan().model_copy(update=only)]
    assert ran[3] == read_plan(tmp_path / "p.toml").model_copy(update=only | {"min_quality": 0.9})


def test_questions_can_be_chosen(ran: list[Plan]) -> None:
    options = ["--task", "recall", "--task", "needle(depth=0.5)", "--protocol", "multi-request"]
    assert run(["study", "run", "--quality-only", *options, "--context-length", "256"]) == 0
    quality = ran[0].quality
    assert quality.tasks == ("recall", "needle(depth=0.5)")
    assert quality.protocols == ("multi-request",)
    assert quality.context_lengths == (256,)
    assert {c for block in ran[0].block for c in block.context_lengths} == {256}


def test_a_papers_plan_is_run_by_its_id(ran: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "--paper", "2410.03065"]) == 0
    assert run(["study", "run", "--paper", "2410.03065", "--repeats", "1", "--block", "table 5"]) == 0
    assert ran[0] == paper_plan("2410.03065")
    assert [(t.name, t.repeats) for t in ran[1].loading] == [("table 5", 1)]
    assert run(["study", "plan", "--paper", "2410.03065"]) == 0
    printed = capsys.readouterr()
    assert read_plan_text(printed.out, "printed") == paper_plan("2410.03065")
    assert "12 cells, at least" in printed.err
    assert "2410.03065 (Cake)" in refused(["study", "--paper", "1706.03762"], capsys)
    (tmp_path / "p.toml").write_text(SMALL)
    assert "leave out" in refused(["study", "run", str(tmp_path / "p.toml"), "--paper", "2410.03065"], capsys)
    assert "leave out --quality-only" in refused(["study", "--quality-only", "--paper", "2410.03065"], capsys)


def test_a_built_in_plan_is_run_by_its_name(
    ran: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["study", "--plan", "methods"]) == 0
    assert run(["study", "run", "--plan", "methods", "--block", "encoding", "--context-length", "512"]) == 0
    assert run(["study", "--plan", "quality"]) == 0
    assert run(["study", "--plan", "default", "--quality-only"]) == 0
    assert run(["study", "--plan", "2410.03065"]) == 0
    assert ran[0] == methods_plan()
    assert ([b.name for b in ran[1].block], ran[1].quality.context_lengths) == (["encoding"], (512,))
    assert ran[2:] == [
        quality_plan(),
        default_plan().model_copy(update={"quality_only": True}),
        paper_plan("2410.03065"),
    ]
    capsys.readouterr()
    assert run(["study", "plan", "--plan", "methods"]) == 0
    printed = capsys.readouterr().out
    assert read_plan_text(printed, "printed") == methods_plan()
    assert printed.startswith("# The methods plan")
    assert run(["study", "plan", "--plan", "default", "--quality-only"]) == 0
    assert read_plan_text(capsys.readouterr().out, "printed").quality_only
    assert "default, quality, methods" in refused(["study", "--plan", "nope"], capsys)
    (tmp_path / "p.toml").write_text(SMALL)
    assert "leave out" in refused(["study", "run", str(tmp_path / "p.toml"), "--plan", "methods"], capsys)
    assert "leave out --paper" in refused(["study", "--plan", "methods", "--paper", "2410.03065"], capsys)
    assert "kvwise study run" in refused(["study", "--plan", "methods", "run"], capsys)


def test_placement_can_be_chosen(ran: list[Plan]) -> None:
    options = [
        "--strategy",
        "full+prefix+cake",
        "--tiers",
        "host(size=1MiB) + disk",
        "--ttl",
        "5",
        "--idle-ttl",
        "never",
    ]
    assert run(["study", "run", "--block", "main", *options]) == 0
    assert ran[0].block[0].tiers == (("host(size=1MiB)", "disk"),)
    assert (ran[0].block[0].ttl_s, ran[0].block[0].idle_ttl_s) == ((5.0,), ("never",))


def test_no_change_leaves_the_plan_as_it_is() -> None:
    assert Overrides().apply(default_plan()) == default_plan()
    assert Overrides(min_quality=0.9).apply(default_plan()).min_quality == 0.9


def test_plan_prints_cells_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.toml").write_text(SMALL)
    assert run(["study", "plan", str(tmp_path / "p.toml"), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [c["strategy"] for c in cells] == ["full", "h2o(budget=0.2)"] * 2


def test_status_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "status", str(folder)]) == 0
    assert capsys.readouterr().out == "study: 4 done, 0 failed, 0 left\n"
    assert run(["study", "status", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 4


def test_report_takes_other_service_levels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(folder, tmp_path / "out")
    assert run(["study", "report", str(copy), "--json", "--goodput", "ttft:0.001"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {f["goodput"]["value"] for f in values["figures"]} == {0}
    assert (copy / "report.html").is_file()
    assert run(["study", "report", str(copy)]) == 0
    assert "run: kvwise generate" in capsys.readouterr().out


def test_report_takes_another_quality_floor(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(folder, tmp_path / "out")
    assert run(["study", "report", str(copy), "--json", "--min-quality", "0.5"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["min_quality"] == 0.5
    assert {r["text"].partition(": ")[2] for r in values["rejected"]} == {"its quality was not measured"}
    assert values["recommendations"] == []
    assert run(["study", "report", str(copy), "--min-quality", "0.5"]) == 0
    assert "no strategy reaches the quality floor" in capsys.readouterr().out


def test_compare_shows_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "compare", str(folder), str(folder)]) == 0
    assert "tie" in capsys.readouterr().out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALL.replace("quality", "qality"), ["unknown key 'block[1].qality'", "did you mean 'quality'"]),
        (SMALL.replace("0.2", "1.5"), ["budget=1.5", "at most 1", "block 'b'"]),
        (SMALL.replace("h2o", "h3o"), ["unknown method 'h3o'", "did you mean 'h2o'"]),
        (SMALL.replace("random:3m", "/no/such/folder"), ["/no/such/folder"]),
        ("", ["is empty"]),
    ],
)
def test_a_bad_plan_is_one_line_and_exit_2(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.toml").write_text(text)
    line = refused(["study", "run", str(tmp_path / "p.toml"), "--output", str(tmp_path / "out")], capsys)
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_exists_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    line = refused(["study", "--output", str(tmp_path / "mine")], capsys)
    assert "exists and is no study" in line
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    line = refused(["study", "--overwrite-own", "--output", str(tmp_path / "mine")], capsys)
    assert "exists and is no study" in line


def test_a_study_of_another_plan_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["study", "--output", str(folder)], capsys)
    assert "holds a study of another plan" in line
    assert "--overwrite-own" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "status", "nowhere"], "is no study"),
        (["study", "report", "nowhere"], "is no study"),
        (["study", "compare", "nowhere", "nowhere"], "is no study"),
        (["study", "run", "nowhere.toml"], "nowhere.toml is no file"),
        (["study", "run", "--request-rate", "fast"], "'fast' must be a number"),
        (["study", "run", "--budget", "1.5"], "budget=1.5"),
        (["study", "run", "--min-quality", "2"], "min_quality"),
        (["study", "run", "--agreement-floor", "0.9"], "--agreement-floor"),
        (["study", "run", "--task", "recal"], "recal"),
        (["study", "run", "--protocol", "blind"], "protocols"),
        (["study", "--quality-only", "status", "x"], "options go behind the command"),
        (["study", "run", "--link", "host:moon=1GB/s"], "no link is called 'host:moon'"),
        (["study", "run", "--trace", "nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["study", "--json", "status", "x"], "options go behind the command"),
        (["study", "nonsense"], "nonsense"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_the_docs_name_options_that_exist_and_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--strategy"}
    known = ""
    for command in ([], ["run"], ["report"], ["plan"]):
        with contextlib.suppress(SystemExit):
            run(["study", *command, "--help"])
        known += capsys.readouterr().out
    assert {option for option in named if option not in known} == set()
    assert {name for name in tasks() if f"`{name}`" not in text and f"`{name}(" not in text} == set()
