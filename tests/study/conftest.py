"""A small study, run once on the fake bench; tests that change it work on a copy."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvwise.study.plan import Plan, plan_hash, read_plan_text
from kvwise.study.record import StudyFolder
from kvwise.study.rows import CellResult
from kvwise.study.run import run_study
from tests.study.fake import FakeBench

PLAN = """
name = "small"
[slo]
ttft_ms = 60
tpot_ms = 8
[quality]
prompts = 3
tokens = 8
[onoff]
model = "random:gpt-neo-13m"
output_tokens = [4, 8, 16]
[[block]]
name = "main"
strategies = ["full+prefix", "h2o(budget={budget})", "infinigen(budget={budget})"]
budgets = [0.5, 0.1]
models = ["random:3m", "random:13m"]
request_rates = [8.0, 64.0]
context_lengths = [128]
repeats = 2
[block.workload]
kind = "chat"
[block.load]
duration_s = 1.0
max_requests = 16
[[block]]
name = "memory"
strategies = ["full", "h2o(budget={budget})", "hungry"]
budgets = [0.2]
models = ["random:13m"]
concurrency = [2, 4]
context_lengths = [256]
memory = ["512 tokens", "64MiB"]
[block.workload]
kind = "random"
[block.load]
max_requests = 8
"""

PROVENANCE = {
    "kvwise_version": "0.1.0",
    "commit": "0123456789ab",
    "torch_version": "2",
    "transformers_version": "5",
    "machine": "a fake",
    "threads": 1,
    "seed": 0,
}


class Silent:
    """A watcher that remembers and says nothing; `stop_after` cells it interrupts the run, as Ctrl+C does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.results: list[CellResult] = []
        self.left: list[float] = []
        self.stop_after = stop_after
        self.not_started = 0
        self.recorded = 0

    def started(self, total: int, recorded: int, left_s: float) -> None:
        self.recorded = recorded

    def began(self, cell: Any) -> None:
        if self.stop_after is not None and len(self.results) == self.stop_after:
            raise KeyboardInterrupt

    def ended(self, result: CellResult, left_s: float) -> None:
        self.results.append(result)
        self.left.append(left_s)

    def stopped(self, left: int) -> None:
        self.not_started = left


def make_plan(text: str = PLAN) -> Plan:
    return read_plan_text(text, "test")


def run_fake(plan: Plan, path: Path, watcher: Silent | None = None, bench: FakeBench | None = None) -> Any:
    facts = PROVENANCE | {"plan_hash": plan_hash(plan)}
    return run_study(plan, path, bench or FakeBench(), watcher or Silent(), facts)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small study. Read only: tests that write copy it."""
    path = tmp_path_factory.mktemp("study") / "out"
    run_fake(make_plan(), path)
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the small study's folder."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(scope="session")
def opened(finished: Path) -> tuple[StudyFolder, Plan]:
    return StudyFolder.open(finished)
