"""Loading on a real engine: traffic over tiers, and the first token of a stored prefix, small and at any speed."""

from pathlib import Path

import pytest

from kvwise.core.errors import CapacityError, PlanError
from kvwise.study.cells import expand
from kvwise.study.charts import study_charts
from kvwise.study.face import LoaderSetup
from kvwise.study.loading_charts import LOADING, TIERS
from kvwise.study.placement import Placement
from kvwise.study.record import StudyFolder
from kvwise.study.report import write_report
from kvwise.study.workbench import Workbench
from tests.study.conftest import Silent, make_plan, run_fake

REAL = """
name = "real"
threads = 1
[[loading]]
name = "first token"
models = ["random:llama-tiny"]
methods = ["load", "cake(chunk=16, escape=false)", "layerwise", "load(codec=int8)"]
tier = "memory"
context_lengths = [96]
bandwidths = ["1x", "1GB/s"]
compute_shares = [1.0, 0.5]
step_tokens = 32
repeats = 1
mixed = { requests = 3, low = 4, high = 20 }
[[block]]
name = "traffic"
strategies = ["full+prefix", "full+prefix+load"]
models = ["random:llama-tiny"]
concurrency = [1]
context_lengths = [128]
memory = ["384 tokens"]
tiers = [["memory(size=8MiB)", "disk(size=8MiB)"]]
links = [{ "memory:host" = "1GB/s" }]
ttl_s = [60.0]
[block.workload]
kind = "document"
questions = 4
answer_tokens = 8
[block.load]
max_requests = 16
time_limit_s = 120.0
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "out"
    plan = make_plan(REAL)
    progress = run_fake(plan, path, Silent(), Workbench(plan, path / "scratch"))  # type: ignore[arg-type]
    assert progress.failed == ()
    return path


def test_every_method_gives_the_tokens_that_computing_gives(measured: Path) -> None:
    rows = StudyFolder(measured).rows("loads")
    methods = ("compute", "load", "cake(chunk=16, escape=false)", "layerwise", "load(codec=int8)")
    assert {(r["method"], r["bandwidth"], r["compute_share"]) for r in rows} == {
        (m, b, s) for m in methods for b in ("1x", "1GB/s") for s in (1.0, 0.5)
    }
    for r in rows:
        assert r["identical"] or "int8" in r["method"]
        assert r["tokens_loaded"] + r["tokens_computed"] == 96
        assert 0 < r["ttft_s"] <= r["all_first_s"]
        assert r["num_others"] == 3
        # All blocks but the last, of which one token must be computed, come back where nothing is computed beside.
        if r["method"].startswith(("load", "layerwise")):
            assert (r["decision"], r["tokens_loaded"]) == ("load", 80) or r["method"] == "layerwise"
        if r["method"] == "compute":
            assert (r["decision"], r["tokens_loaded"]) == (None, 0)
        assert r["regret_s"] is None or r["decision"] is not None


def test_traffic_finds_below_what_the_device_had_no_room_for(measured: Path) -> None:
    cells = {r["framework"]: r for r in StudyFolder(measured).rows("cells") if r["kind"] == "live"}
    plain, loads = cells["full+prefix"], cells["full+prefix+load"]
    assert plain["tiers"] == loads["tiers"] == "memory(size=8MiB) + disk(size=8MiB)"
    assert plain["tier_hits"] == {} and plain["tokens_loaded"] == 0
    assert loads["tier_hits"]["memory"] > 0
    assert 0 < loads["tier_hit_ratio"]["memory"] < 1
    assert loads["tier_bytes"]["disk"] > 0 and loads["tier_faults"] == {"memory": 0, "disk": 0}
    assert loads["tokens_loaded"] == loads["did"]["load"] > 0
    assert sum(loads["loads"].values()) > 0
    assert loads["links"]["memory:host"].startswith("memory:host throttled to 1 GB/s")
    asked, found = loads["prefix_queries"], sum(loads["tier_token_share"].values())
    assert 0 < found <= 1 and asked > 0


def test_the_folder_of_the_disk_tier_is_gone_and_the_report_is_built(measured: Path) -> None:
    assert not (measured / "scratch").exists()
    study, _, page = write_report(*StudyFolder.open(measured))
    sections = {c.section for c in study_charts(study)}
    assert {LOADING, TIERS} <= sections
    assert "Link memory:host: throttled to 1GB/s in block traffic" in page.read_text(encoding="utf-8")


def test_a_prefix_that_the_tier_cannot_hold_is_no_measurement() -> None:
    bench = Workbench(make_plan(REAL))
    facts = bench.facts("random:llama-tiny")
    tier = f"memory(size={40 * facts.kv_token_bytes})"
    loader = bench.loader(LoaderSetup("random:llama-tiny", "full+prefix+load", tier, longest=96, step_tokens=32))
    try:
        with pytest.raises(CapacityError, match=r"of 6 blocks of the prefix \d lie in tier memory"):
            loader.store(list(range(96)))
    finally:
        loader.close()


def test_placements_are_judged_before_anything_runs() -> None:
    bench = Workbench(make_plan(REAL))
    bench.check_placement("full+prefix+load", Placement(("host",), (("host:device", "1GB/s"),)))
    bench.check_placement("full", Placement(("disk",)))
    with pytest.raises(PlanError, match="load loads from tiers; add `tiers"):
        bench.check_placement("full+prefix+load", Placement())
    with pytest.raises(PlanError, match=r"no link is called 'disk:host' with these tiers; links: .*host:device"):
        bench.check_placement("full+prefix+load", Placement(("host",), (("disk:host", "1GB/s"),)))
    assert bench.idle_methods("full+prefix+cake", {}, 16) == ("cake",)
    assert bench.idle_methods("full+prefix+cake", {}, 16, 2) == ()
    with pytest.raises(PlanError, match="no link is called 'floppy:host'"):
        Workbench(make_plan('[links]\n"floppy:host" = "1GB/s"\n' + REAL.partition("threads = 1")[2]))
    assert len(expand(make_plan(REAL))) == 2 + 2
