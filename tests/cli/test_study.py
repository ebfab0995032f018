"""`kvwise study`: plans printed, folders reported and compared, bad usage in one line and exit 2 with nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from kvwise.cli.main import run
from kvwise.study.plan import default_plan, read_plan_text
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
