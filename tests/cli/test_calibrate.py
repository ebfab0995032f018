"""`kvwise calibrate kvsharer` prints a strategy that serves the model it was made for."""

from pathlib import Path

import pytest

from kvwise.cli.main import run

MODEL = ["calibrate", "kvsharer", "--model", "random:llama-tiny"]


def test_the_strategy_goes_to_standard_output_and_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "strategy.txt"
    assert run([*MODEL, "--share", "2", "--threshold", "0.1", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == out.read_text(encoding="utf-8")
    assert printed.out.startswith("kvsharer(map=")
    assert "2 of 4 layers store KV; the sample was 30 rows of 64 tokens" in printed.err
    line = printed.out.strip()
    ids = ["--prompt-ids", "1,2,3", "--max-tokens", "4", "--ignore-eos"]
    assert run(["generate", "--model", "random:llama-tiny", "--strategy", line, *ids]) == 0


def test_too_few_layers_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*MODEL, "--threshold", "0.9999"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "kvsharer(map=all)\n"
    assert "fewer than 1 layers share: no other pair exceeds the threshold 0.9999" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "4"], "share=4 layers cannot read another's KV"),
        (["--threshold", "2"], "threshold=2.0 is no cosine to exceed"),
        (["--out", "/nowhere/at/all.txt"], "/nowhere/at is no folder; make it first"),
        (["--text", "/nowhere/at/all.txt"], "--text /nowhere/at/all.txt cannot be read"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert run([*MODEL, *options]) == 2
    assert message in capsys.readouterr().err
