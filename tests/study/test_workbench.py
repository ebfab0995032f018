"""The real bench: a small study of the three frameworks on a real engine, with the cache on and off beside it."""

from pathlib import Path

import pytest

from kvwise.core.errors import StrategyError
from kvwise.study.record import StudyFolder
from kvwise.study.report import write_report
from kvwise.study.workbench import Workbench
from tests.study.conftest import Silent, make_plan, run_fake

REAL = """
name = "real"
[quality]
prompts = 2
tokens = 4
[onoff]
model = "random:gpt-neo-13m"
prompt_tokens = 8
output_tokens = [4, 12]
repeats = 1
[[block]]
name = "chat"
strategies = ["full+prefix", "h2o(budget={budget})", "infinigen(budget={budget})"]
budgets = [0.25]
models = ["random:llama-tiny"]
concurrency = [2]
context_lengths = [48]
[block.workload]
kind = "chat"
answer_tokens = 4
[block.load]
max_requests = 5
time_limit_s = 120.0
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "out"
    plan = make_plan(REAL)
    progress = run_fake(plan, path, Silent(), Workbench(plan))  # type: ignore[arg-type]
    assert progress.failed == ()
    return path


def test_three_frameworks_run_on_one_engine_and_each_did_its_work(measured: Path) -> None:
    rows = {r["framework"]: r for r in StudyFolder(measured).rows("cells") if r["kind"] == "live"}
    assert set(rows) == {"full+prefix", "h2o", "infinigen"}
    assert rows["full+prefix"]["tokens_reused"] > 0
    assert rows["h2o"]["did"]["h2o"] > 0
    assert rows["infinigen"]["did"]["infinigen"] > 0
    assert rows["infinigen"]["peak_kv_bytes"]["host"] > 0
    for row in rows.values():
        assert (row["num_finished"], row["num_errors"]) == (5, 0)
        assert 0 < row["mean_kv_bytes"]["device"] <= row["peak_kv_bytes"]["device"] <= row["pool_bytes"]


def test_the_lossless_strategy_agrees_wholly_with_the_full_cache(measured: Path) -> None:
    rows = [r for r in StudyFolder(measured).rows("quality") if r["framework"] == "full+prefix"]
    assert len(rows) == 2 * 4
    assert all(r["same_top1"] for r in rows)
    assert max(r["kl_nats"] for r in rows) < 1e-6
    lossy = [r["kl_nats"] for r in StudyFolder(measured).rows("quality") if r["framework"] == "h2o"]
    assert max(lossy) > 1e-6


def test_forced_answers_become_the_history_that_the_prefix_cache_knows(measured: Path) -> None:
    rows = [r for r in StudyFolder(measured).rows("requests") if r["framework"] == "full+prefix"]
    later = [r for r in rows if r["turn"] > 0]
    assert later
    # The system prompt alone is 48 tokens; more means that the turn before was found again.
    assert max(r["cached_tokens"] for r in later) > 48


def test_tokens_are_the_same_with_and_without_a_cache(measured: Path) -> None:
    rows = StudyFolder(measured).rows("onoff")
    assert {(r["side"], r["num_output_tokens"]) for r in rows} == {
        (side, n) for side in ("hf-off", "hf-on", "kvwise") for n in (4, 12)
    }
    assert all(r["identical"] and 0 < r["first_s"] <= r["total_s"] for r in rows)


def test_the_report_is_built_of_it(measured: Path) -> None:
    study, verdict, page = write_report(*StudyFolder.open(measured))
    assert page.stat().st_size > 1_000_000
    assert len(verdict.decisions) == 1
    assert not study.links


def test_strategies_are_judged_by_the_catalogue() -> None:
    bench = Workbench(make_plan(REAL))
    with pytest.raises(StrategyError, match=r"budget=1\.5"):
        bench.check_strategy("h2o(budget=1.5)")
    assert bench.idle_methods("h2o(budget=0.5)", {}, 0) == ("h2o",)
    assert bench.idle_methods("h2o(budget=0.5)", {"h2o": 3}, 0) == ()
    assert bench.idle_methods("full+prefix", {}, 0) == ("prefix",)
    assert bench.idle_methods("full+prefix", {}, 16) == ()
    assert bench.idle_methods("full", {}, 0) == ()
