"""Progress: plain lines in a pipe, one a cell, failures with their reason."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvwise.study.progress import BarWatcher, PlainWatcher, clock_time, make_watcher
from tests.study.conftest import make_plan, run_fake

PLAN = """
[[block]]
name = "b"
strategies = ["full", "broken"]
models = ["random:3m"]
context_lengths = [32]
quality = false
[block.workload]
kind = "random"
[block.load]
max_requests = 2
"""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3725, "1:02:05"), (-3, "0:00")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    watcher, bar = make_watcher(stream)
    assert isinstance(watcher, PlainWatcher)
    assert bar is None
    run_fake(make_plan(PLAN), tmp_path / "out", watcher)  # type: ignore[arg-type]
    first, done, failed = stream.getvalue().splitlines()
    assert first == "2 cells, about 0:07"
    assert done.startswith("[1/2] full, random:3m, all at once, context 32, repeat 1: done, about 0:0")
    assert "[2/2] broken" in failed
    assert "FAILED MemoryError: no memory for this method, about 0:00 left" in failed


def test_a_terminal_gets_a_bar_and_failures_stay_above_it(tmp_path: Path) -> None:
    stream = io.StringIO()
    bar = BarWatcher(Console(file=stream, force_terminal=True, width=100))
    run_fake(make_plan(PLAN), tmp_path / "out", bar)  # type: ignore[arg-type]
    bar.close()
    assert "2/2" in stream.getvalue()
    assert "MemoryError: no memory for this method" in stream.getvalue()
