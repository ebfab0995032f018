"""Placement as axes: tiers, links and times to live in cells, rows, figures, charts; older studies stay readable."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kvwise.core.errors import PlanError, UsageError
from kvwise.study.cells import CellKind, expand
from kvwise.study.charts import study_charts
from kvwise.study.loading_charts import TIERS
from kvwise.study.overrides import Overrides
from kvwise.study.placement import NOWHERE, Placement, brief, tier_spec
from kvwise.study.plan import Plan, plan_hash, read_plan_text
from kvwise.study.recommend import judge
from kvwise.study.record import StudyFolder
from kvwise.study.report import write_report
from kvwise.study.summary import Study, load_study
from kvwise.study.tier_rows import LOAD_REPORT
from kvwise.study.tier_rows import TIERS as TIER_COLUMNS
from kvwise.study.toml import to_toml
from kvwise.study.words import condition
from tests.study.conftest import make_plan, run_fake
from tests.study.fake import FakeBench

PLACED = """
[[block]]
name = "placed"
strategies = ["full+prefix", "full+prefix+cake"]
models = ["random:3m"]
concurrency = [2]
context_lengths = [64]
tiers = [["host(size=1MiB)"], ["host(size=1MiB)", "disk(size=4MiB)"]]
links = [{}, { "host:device" = "20MB/s" }]
ttl_s = [2.0, "never"]
repeats = 2
[block.workload]
kind = "document"
questions = 4
answer_tokens = 4
[block.load]
max_requests = 8
"""
# A plan and its cells as they were named before there was any placement.
OLD = """
seed = 3
[[block]]
name = "b"
strategies = ["full", "h2o(budget=0.2)"]
models = ["random:3m"]
context_lengths = [64]
[block.workload]
kind = "random"
"""
OLD_HASH = "a567e02d8714de1a"
OLD_IDS = ["0fc87749236e", "739108d44517", "a281c235c17c", "95e53e043994"]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeBench]:
    path, bench = tmp_path_factory.mktemp("placed") / "out", FakeBench()
    run_fake(make_plan(PLACED), path, bench=bench)
    return path, bench


@pytest.fixture(scope="module")
def study(placed: tuple[Path, FakeBench]) -> Study:
    return load_study(*StudyFolder.open(placed[0]))


def test_a_disk_tier_lies_in_the_given_folder_unless_it_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "with a space, and (more)"
    assert tier_spec("disk", folder).where == str(folder)
    spec = tier_spec("disk(size=4MiB, policy=sieve)", folder)
    assert (spec.where, spec.size_bytes, spec.policy) == (str(folder), 4 << 20, "sieve")
    assert tier_spec("disk(path=/kv)", folder).where == "/kv"
    assert tier_spec("host(size=1MiB)", folder).where == ""
    with pytest.raises(UsageError, match="colour"):
        tier_spec("disk(colour=red)", folder)
    with pytest.raises(UsageError, match="no tier is called 'floppy'"):
        tier_spec("floppy", folder)


def test_tiers_are_told_apart_in_few_words() -> None:
    assert brief("host(size=256MiB) + disk(size=1GiB, policy=sieve)") == "host 256MiB + disk 1GiB sieve"
    words = Placement(("host(size=1MiB)",), (("host:device", "1GB/s"),), 2.0, 0.5).words()
    assert words == ["host 1MiB", "host:device 1GB/s (throttled)", "TTL 2 s", "idle TTL 0.5 s"]
    assert NOWHERE.words() == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["host(size=1MiB)"]', '["hst(size=1MiB)"]', "block 'placed': tiers: no tier is called 'hst'"),
        ('["host(size=1MiB)"]', '["host", "host(size=1MiB)"]', "tiers name 'host' twice in one list"),
        ('["host(size=1MiB)"]', '["redis"]', "redis does not say where it lies"),
        ('["host(size=1MiB)"], [', '["host"], ["host"], [', "tiers names ('host',) twice"),
        ('"20MB/s"', '"fast"', "host:device=fast"),
        ("[2.0,", "[0.0,", "ttl_s"),
        ('"never"]', '"ever"]', "ttl_s"),
        ("links = [{}, {", "links = [{}, {}, {", "links names {} twice"),
    ],
)
def test_bad_placements_are_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(PLACED.replace(old, new))
    assert words in str(caught.value)


def test_placement_is_a_product_of_axes_and_part_of_each_cell() -> None:
    plan = make_plan(PLACED)
    assert read_plan_text(to_toml(plan), "again") == plan
    cells = expand(plan)
    assert {c.kind for c in cells} == {CellKind.LIVE}  # no exam has tiers
    assert len(cells) == len({c.id for c in cells}) == 2 * 2 * 2 * 2 * 2
    assert {c.placement.ttl_s for c in cells} == {2.0, None}
    told = next(c for c in cells if len(c.placement.tiers) == 2 and c.placement.links and c.placement.ttl_s)
    assert "host 1MiB + disk 4MiB, host:device 20MB/s (throttled), TTL 2 s" in told.describe()
    groups = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    assert all(a.placement == b.placement and a.strategy != b.strategy for a, b in groups)


def test_cells_and_plans_without_placement_keep_the_names_they_had() -> None:
    plan = make_plan(OLD)
    assert plan_hash(plan) == OLD_HASH
    assert [c.id for c in expand(plan)] == OLD_IDS
    changed = make_plan(OLD.replace("context_lengths", 'tiers = [["memory"]]\ncontext_lengths'))
    assert plan_hash(changed) != OLD_HASH
    assert not {c.id for c in expand(changed)} & set(OLD_IDS[-2:])
    stored = make_plan(OLD.replace("seed = 3", "seed = 3\n[engine]\nstore_after = 2"))
    assert plan_hash(stored) != OLD_HASH


def test_engines_get_the_placement_and_rows_tell_what_the_tiers_did(placed: tuple[Path, FakeBench]) -> None:
    path, bench = placed
    assert {e.placement.tiers_text for e in bench.engines} == {"host(size=1MiB)", "host(size=1MiB) + disk(size=4MiB)"}
    rows = StudyFolder(path).rows("cells")
    assert len(rows) == 32
    for row in rows:
        if row["framework"] == "full+prefix":
            assert row["tier_hits"] == {} and row["loads"] == {} and row["mean_regret_s"] is None
            continue
        tiers = ["host", "disk"] if "disk" in row["tiers"] else ["host"]
        assert sorted(row["tier_hits"]) == sorted(tiers)
        for name in tiers:
            hits, misses = row["tier_hits"][name], row["tier_misses"][name]
            assert row["tier_hit_ratio"][name] == pytest.approx(hits / (hits + misses))
            assert row["tier_token_share"][name] == pytest.approx(16 * hits / row["prefix_queries"])
            assert hits == (row["prefix_queries"] // 64 if name == "host" else hits)  # without the warm-up's
            assert row["tier_bytes"][name] > 0
            assert row["tier_faults"][name] == 0  # those of the warm-up do not count
        assert row["loads"] == {"both": 8}
        assert row["mean_regret_s"] == pytest.approx(0.002)
        assert row["tokens_loaded"] == 8 * 16
    requests = StudyFolder(path).rows("requests")
    assert {r["decision"] for r in requests} == {None, "both"}


def test_conditions_are_compared_within_one_placement(study: Study) -> None:
    assert len({f.condition for f in study.figures}) == 8
    assert [f.condition.placed for f in study.figures[:2]] == [", host 1MiB, TTL 2 s"] * 2
    assert math.isinf(study.figures[2].condition.ttl_s)
    assert "host:device 20MB/s (throttled)" in condition(study.figures[4].condition)
    cake = next(f for f in study.figures if f.who.framework == "full+prefix+cake")
    assert cake.loads == {"both": 16} and cake.tokens_loaded == 256
    assert list(cake.tier_shares) == ["device", "host"]
    verdict = judge(study)
    assert len(verdict.decisions) == 8
    (advice,) = verdict.recommendations
    told = replace(advice, figures=next(f for f in study.figures if len(f.tier_shares) == 3)).command
    assert told.endswith("full+prefix+cake --tier 'host(size=1MiB)' --tier 'disk(size=4MiB, path=kv-cache)'")
    assert "--tier" not in replace(advice, figures=study.figures[0]).command


def test_every_axis_of_placement_has_charts_with_nothing_else_varied_in_a_line(study: Study) -> None:
    charts = {c.id: c for c in study_charts(study)}
    sections = {c.section for c in charts.values()}
    assert {"Over the tiers", "Over link bandwidths", "Over the time to live", TIERS} <= sections
    assert len(charts) == len(study_charts(study))
    for c in charts.values():
        for s in c.series:
            assert len(set(s.x)) == len(s.x), c.id
    tiers = next(c for c in charts.values() if c.section == "Over the tiers")
    assert [word for _, word in tiers.ticks] == ["host 1MiB", "host 1MiB + disk 4MiB"]
    lasting = next(c for c in charts.values() if c.section == "Over the time to live")
    assert [word for _, word in lasting.ticks] == ["2", "none"]
    found = [c for c in charts.values() if c.section == TIERS]
    assert len(found) == 8
    both = next(c for c in found if "disk" in c.title and "TTL" not in c.title)
    assert [s.label for s in both.series] == ["disk · cake", "host · cake", "device · cake"]
    figures = next(f for f in study.figures if len(f.tier_shares) == 3)
    assert both.series[1].y[0] == pytest.approx(100 * figures.tier_shares["host"])


def test_a_strategy_that_loads_needs_tiers(tmp_path: Path) -> None:
    text = PLACED.replace('tiers = [["host(size=1MiB)"], ["host(size=1MiB)", "disk(size=4MiB)"]]', "quality = false")
    with pytest.raises(PlanError, match="loads from tiers"):
        run_fake(make_plan(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_replaces_placement() -> None:
    plan = Overrides(tiers=["none", "host(size=2MiB) + memory"], ttl=["3", "never"], idle_ttl=["1"]).apply(
        make_plan(PLACED)
    )
    (block,) = plan.block
    assert block.tiers == ((), ("host(size=2MiB)", "memory"))
    assert (block.ttl_s, block.idle_ttl_s) == ((3.0, "never"), (1.0,))
    for changes in (Overrides(tiers=["floppy"]), Overrides(ttl=["soon"])):
        with pytest.raises(PlanError):
            changes.apply(make_plan(PLACED))


def test_a_study_of_the_format_before_is_read_and_gone_on_with(copied: Path, opened: tuple[StudyFolder, Plan]) -> None:
    marker = json.loads((copied / "study.json").read_text())
    (copied / "study.json").write_text(json.dumps(marker | {"format": 2}))
    later = {*TIER_COLUMNS, *LOAD_REPORT, "tiers", "throttles", "ttl_s", "idle_ttl_s", "compute_share", "miss"}
    for file in (copied / "cells").glob("*/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns([c for c in table.column_names if c in later]), file)
    folder, plan = StudyFolder.open(copied)
    study, _, page = write_report(folder, plan)
    before = load_study(*opened)
    assert [(f.condition, f.who, f.output_rate) for f in study.figures] == [
        (f.condition, f.who, f.output_rate) for f in before.figures
    ]
    assert page.is_file()
    assert run_fake(plan, copied).left == ()


def test_a_condition_differs_in_its_placement_only_by_what_is_given() -> None:
    from kvwise.study.summary import Condition

    plain = Condition("b", "m", 1, "auto", 1.0, 2.0)
    assert plain.placed == ""
    assert replace(plain, tiers="memory(size=1MiB)", idle_ttl_s=4.0).placed == ", memory 1MiB, idle TTL 4 s"
