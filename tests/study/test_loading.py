"""Loading: methods in turn over one prefix, bandwidths by the measured break-even, and figures beside the optimum."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvwise.core.errors import CapacityError, PlanError
from kvwise.study.built_in import default_plan, paper_plan
from kvwise.study.cells import CellKind, expand
from kvwise.study.charts import study_charts
from kvwise.study.face import StepTime
from kvwise.study.fixed import held_fixed
from kvwise.study.loader import StepMeter
from kvwise.study.loading import fit_steps, loading_seconds
from kvwise.study.loading_charts import LOADING, OPTIMUM
from kvwise.study.loading_figures import Place, cake_of, loading_figures, mean_speedups
from kvwise.study.loading_section import read_bandwidth
from kvwise.study.page import render
from kvwise.study.papers import GBPS, LARGE_MODEL, SMALL_KV, compare_paper
from kvwise.study.plan import PAPERS, read_plan_text
from kvwise.study.recommend import judge
from kvwise.study.record import StudyFolder
from kvwise.study.rows import Row
from kvwise.study.run import nominal_seconds
from kvwise.study.summary import Study, load_study
from kvwise.study.table import as_values, print_study
from kvwise.study.toml import to_toml
from tests.study.conftest import make_plan, run_fake
from tests.study.fake import FakeBench

GRID = """
[[loading]]
name = "grid"
models = ["random:3m"]
methods = ["load", "cake"]
context_lengths = [512, 1024]
bandwidths = ["0.5x", "2x", "4MB/s"]
compute_shares = [1.0, 0.25]
step_tokens = 128
repeats = 3
"""
MIXED = GRID.replace("[512, 1024]", "[512]").replace("[1.0, 0.25]", "[1.0]") + (
    "mixed = { requests = 5, low = 10, high = 50 }\n"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeBench]:
    path, bench = tmp_path_factory.mktemp("loading") / "out", FakeBench()
    assert run_fake(make_plan(GRID), path, bench=bench).failed == ()
    return path, bench


@pytest.fixture(scope="module")
def rows(measured: tuple[Path, FakeBench]) -> list[Row]:
    return StudyFolder(measured[0]).rows("loads")


@pytest.fixture(scope="module")
def study(measured: tuple[Path, FakeBench]) -> Study:
    return load_study(*StudyFolder.open(measured[0]))


def test_bandwidths_are_speeds_or_multiples_of_the_break_even() -> None:
    assert read_bandwidth("0.3x") == (0.3, True)
    assert read_bandwidth("20MB/s") == (20e6, False)
    assert read_bandwidth("8Gbps") == (1e9, False)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"4MB/s"', '"fast"', "loading 'grid': bandwidth 'fast' is none; write a speed"),
        ('"4MB/s"', '"0x"', "bandwidth '0x' must be above 0"),
        ('"4MB/s"', '"2x"', "bandwidths names '2x' twice"),
        ('"load",', '"compute",', "which is always measured"),
        ("step_tokens = 128", 'step_tokens = 128\ntier = "floppy"', "no tier is called 'floppy'"),
        ("[1.0, 0.25]", "[1.0, 0.001]", "is no token"),
        ("[1.0, 0.25]", "[1.5]", "compute_shares[1]"),
        ("repeats = 3", "repeats = 3\nmixed = { requests = 1, low = 9, high = 3 }", "swap them"),
        ("repeats = 3", 'repeats = 3\n[[loading]]\nname = "grid"\nmodels = ["m"]', "two blocks are called 'grid'"),
        ("repeats = 3", "repeatz = 3", "unknown key 'loading[1].repeatz'"),
    ],
)
def test_bad_tables_are_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(GRID.replace(old, new))
    assert words in str(caught.value)


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="measures nothing"):
        make_plan('name = "x"')


def test_a_cell_for_each_model_length_and_share() -> None:
    plan = make_plan(GRID)
    assert read_plan_text(to_toml(plan), "again") == plan
    cells = expand(plan)
    assert {c.kind for c in cells} == {CellKind.LOADING}
    assert [(c.context, c.share) for c in cells] == [(512, 1.0), (512, 0.25), (1024, 1.0), (1024, 0.25)]
    assert len({c.id for c in cells}) == 4
    assert cells[1].describe() == "loading, grid, random:3m, context 512, 25 % of each step"
    other = expand(make_plan(GRID.replace('"2x"', '"3x"')))
    assert not {c.id for c in cells} & {c.id for c in other}
    slow = loading_seconds(plan.loading[0], 1024, 0.25)
    assert slow == nominal_seconds(cells[3]) > 1.5 * nominal_seconds(cells[2])


def test_full_steps_are_fitted_by_a_line_that_one_slow_step_does_not_tilt() -> None:
    steps = [StepTime(64, 64 * i, 0.01 + 1e-5 * 64 * i) for i in range(20)]
    assert fit_steps(steps) == pytest.approx((0.01, 1e-5))
    disturbed = [*steps[:-1], StepTime(64, 64 * 19, 9.0)]
    assert fit_steps(disturbed) == pytest.approx((0.01, 1e-5), rel=0.1)
    assert fit_steps([StepTime(64, 0, 0.5)]) == (0.5, 0.0)
    assert fit_steps([StepTime(1, i, 1.0 - i / 10) for i in range(4)])[1] == 0.0
    assert fit_steps([]) == (0.0, 0.0)


def test_a_part_of_a_step_is_drawn_out_to_the_whole() -> None:
    slept: list[float] = []
    meter = StepMeter(16, (0.02, 1e-4), slept.append)
    meter.charge(16, 100, 0.005)
    meter.charge(8, 100, 0.005)  # half of its part: half of the step
    meter.charge(16, 0, 0.5)  # longer anyway
    meter.undisturbed = True
    meter.charge(16, 100, 0.005)
    assert slept == pytest.approx([0.025, 0.010])
    assert [s.seconds for s in meter.steps] == pytest.approx([0.03, 0.015, 0.5, 0.005])


def test_methods_take_turns_over_one_prefix_and_the_first_round_is_not_counted(
    measured: tuple[Path, FakeBench], rows: list[Row]
) -> None:
    _, bench = measured
    assert len(rows) == 4 * 3 * 3 * 3
    assert {(r["method"], r["run"]) for r in rows} == {(m, n) for m in ("compute", "load", "cake") for n in range(3)}
    calibration, *loaders = bench.loaders
    assert (calibration.setup.strategy, calibration.setup.share, calibration.setup.longest) == ("full+prefix", 1, 1024)
    assert len(loaders) == 4 * 3
    assert all(loader.closed for loader in bench.loaders)
    compute, load, cake = loaders[:3]
    assert (compute.stored, load.stored, cake.stored) == (0, 512, 512)
    # Warm-up, then three runs at each of three bandwidths; Cake has one more at each, to learn from.
    assert [len(x.speeds) for x in (compute, load, cake)] == [10, 9, 12]
    ran = bench.log[5:15]  # calibrated, warmed up: now the first bandwidth
    assert ran == ["cake", "prefix", "load", "cake", "load", "cake", "prefix", "cake", "prefix", "load"]
    shared = loaders[3].setup
    assert shared.share == 0.25 and shared.full_step_s == pytest.approx((0.002, 2e-6))
    assert loaders[0].setup.full_step_s is None


def test_relative_bandwidths_stand_on_the_longest_prefix_of_the_table(rows: list[Row]) -> None:
    steps = [0.002 + 2e-6 * at for at in range(0, 1024, 128)]
    even = 1024 * 4096 / sum(steps)
    speeds = {(r["bandwidth"], r["bytes_per_s"]) for r in rows}
    assert {text for text, _ in speeds} == {"0.5x", "2x", "4MB/s"}
    assert len(speeds) == 3  # the same at every length and share
    assert dict(speeds) == pytest.approx({"0.5x": even / 2, "2x": 2 * even, "4MB/s": 4e6})
    assert all(r["break_even_bytes_per_s"] == pytest.approx(even) for r in rows)


def test_rows_tell_what_was_decided_and_what_a_chunk_takes(rows: list[Row]) -> None:
    for r in rows:
        if r["method"] == "compute":
            assert (r["decision"], r["tokens_loaded"]) == (None, 0)
            continue
        assert (r["decision"], r["regret_s"], r["expected_load_s"]) == ("both", 0.01, 0.1)
        assert r["tokens_loaded"] == r["context"] // 2
        assert r["identical"]
        steps = sorted(0.002 + 2e-6 * at for at in range(0, r["context"], round(128 * r["compute_share"])))
        step = (steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2
        assert r["chunk_s"] == pytest.approx(max(step, 128 * 4096 / r["bytes_per_s"]))


def test_figures_stand_beside_the_optimum_of_the_same_runs(study: Study) -> None:
    assert len(study.loading) == 4 * 3
    for f in study.loading:
        compute, load, cake = (f.methods[m].ttft.value for m in ("compute", "load", "cake"))
        assert f.optimum is not None
        assert f.optimum.value == pytest.approx(compute * load / (compute + load))
        assert f.over_optimum("cake") == pytest.approx(cake / f.optimum.value)
        assert f.speedup("cake", "load") == pytest.approx(load / cake)
        assert f.speedup("cake", "layerwise") is None
        assert f.near_better("cake")
        assert f.methods["cake"].loaded == 0.5
    slow = [f for f in study.loading if f.place.share == 0.25 and f.place.context == 1024]
    fast = [f for f in study.loading if f.place.share == 1.0 and f.place.context == 1024]
    times = [[f.methods["compute"].ttft.value for f in some] for some in (slow, fast)]
    assert times[0][0] == pytest.approx(4 * times[1][0], rel=0.1)


def make_rows(*times: tuple[str, float], context: int = 1) -> list[Row]:
    """One run of each method."""
    fixed = {"block": "b", "model": "m", "context": context, "compute_share": 1.0, "bandwidth": "1x", "num_others": 0,
             "bytes_per_s": 1.0, "break_even_bytes_per_s": 1.0, "run": 0, "chunk_s": 0.1, "regret_s": None,
             "decision": None, "tokens_loaded": 0, "tokens_computed": 1}  # fmt: skip
    return [fixed | {"method": name, "ttft_s": seconds, "all_first_s": seconds} for name, seconds in times]


def test_what_is_near_the_optimum_and_the_better_side() -> None:
    for cake, optimum, better in ((1.20, True, True), (1.21, False, True), (2.1, False, True), (2.11, False, False)):
        (f,) = loading_figures(make_rows(("compute", 2.0), ("load", 2.0), ("cake(chunk=8)", cake)))
        assert cake_of(f) == "cake(chunk=8)"
        assert f.optimum is not None and f.optimum.value == 1.0
        assert (f.near_optimum("cake(chunk=8)"), f.near_better("cake(chunk=8)")) == (optimum, better)
    (alone,) = loading_figures(make_rows(("compute", 2.0), ("cake", 1.0)))
    assert alone.optimum is None and alone.over_optimum("cake") is None and not alone.near_optimum("cake")


def test_means_count_losing_places_and_may_leave_out_what_is_far_off() -> None:
    figures = loading_figures(
        [
            *make_rows(("compute", 2.0), ("load", 30.0), ("cake", 1.0)),
            *make_rows(("compute", 4.0), ("load", 1.0), ("cake", 2.0), context=2),
        ]
    )
    found = mean_speedups(figures)
    assert found is not None
    assert (found.over_load, found.over_compute, found.num, found.losing) == (15.25, 2.0, 2, 1)
    bounded = mean_speedups(figures, most=10.0)
    assert bounded is not None and bounded.over_load == 0.5
    assert mean_speedups(figures, lambda place: place.context == 3) is None
    assert figures[0].place == Place("b", "m", 1, 1.0, "1x")


def test_charts_show_every_method_and_the_optimum(study: Study) -> None:
    charts = [c for c in study_charts(study) if c.section == LOADING]
    assert {c.id for c in charts} == {
        f"loading-{key}-grid-random-3m-{share}" for key in ("bandwidth", "length") for share in ("1", "0-25")
    }
    for c in charts:
        assert [s.label for s in c.series] == ["compute", "load", "cake", OPTIMUM]
        assert c.series[-1].guide
        for s in c.series:
            assert list(s.x) == sorted(set(s.x)) and len(s.x) == len(s.y)
    bandwidth = next(c for c in charts if c.id == "loading-bandwidth-grid-random-3m-1")
    longest = [f for f in study.loading if f.place.context == 1024 and f.place.share == 1.0]
    assert bandwidth.series[2].x == tuple(f.bytes_per_s / 1e6 for f in longest)
    assert bandwidth.series[2].y == tuple(f.methods["cake"].ttft.value * 1e3 for f in longest)
    assert bandwidth.series[3].y == tuple(f.optimum.value * 1e3 for f in longest if f.optimum)
    assert "throttled" in bandwidth.x_label
    length = next(c for c in charts if c.id == "loading-length-grid-random-3m-1")
    assert length.series[0].x == (512.0, 1024.0)


def test_page_terminal_and_json_tell_it(study: Study) -> None:
    verdict = judge(study)
    page = render(study, verdict)
    assert '<h2 id="loading">Loading</h2>' in page
    assert "beside it, the paper&#x27;s 2.6×" in page
    assert "Only loading was measured" in page
    stream = StringIO()
    print_study(Console(width=220, file=stream), study, verdict)
    shown = stream.getvalue()
    assert "Loading: time to the first token" in shown
    assert "grid: 3m, 1024 " in shown and "9 both" not in shown and "3 both" in shown
    assert "Cake over 12 places" in shown
    values = json.loads(json.dumps(as_values(study, verdict), allow_nan=False))
    assert len(values["loading"]) == 12
    assert values["loading"][0]["ttft_s"].keys() == {"compute", "load", "cake"}
    assert "paper" not in values
    assert any("prefix in host(size=256MiB), steps of 128 tokens, 3 runs" in text for _, text in held_fixed(study))


def test_short_requests_come_with_the_long_one_and_are_new_each_time(tmp_path: Path) -> None:
    bench = FakeBench()
    run_fake(make_plan(MIXED), tmp_path / "out", bench=bench)
    rows = StudyFolder(tmp_path / "out").rows("loads")
    assert {r["num_others"] for r in rows} == {5}
    assert all(r["ttft_s"] < r["others_ttft_s"] < r["all_first_s"] for r in rows)
    assert bench.loaders[1].setup.others_tokens == 50
    (_, f, _) = load_study(*StudyFolder.open(tmp_path / "out")).loading
    assert f.speedup("cake", "compute", whole=True) == pytest.approx(
        f.methods["compute"].all_first.value / f.methods["cake"].all_first.value
    )


def test_a_method_that_changes_the_tokens_fails_the_cell(tmp_path: Path) -> None:
    bench = FakeBench()
    bench.wrong_tokens = True
    progress = run_fake(make_plan(GRID), tmp_path / "out", bench=bench)
    assert len(progress.failed) == 4
    assert all(why.startswith("NotIdentical: ") for _, why in progress.failed)
    assert all(loader.closed for loader in bench.loaders)


def test_a_prefix_longer_than_the_model_stops_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="4096 positions of random:3m: lower context_lengths"):
        run_fake(make_plan(GRID.replace("[512, 1024]", "[512, 4096]")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quality_only_leaves_loading_out() -> None:
    with pytest.raises(PlanError, match="measures no quality"):
        expand(make_plan(GRID), quality_only=True)


def test_the_default_plan_has_a_little_of_it() -> None:
    cells = [c for c in expand(default_plan()) if c.kind is CellKind.LOADING]
    assert cells and sum(map(nominal_seconds, cells)) < 20


# -- papers -----------------------------------------------------------------------------------------------------------


def test_an_unknown_paper_is_refused_by_name() -> None:
    for given in ("2401.00001", "cake"):
        with pytest.raises(PlanError, match=r"no plan for the paper .*; known.*: 2410\.03065 \(Cake\)"):
            paper_plan(given)
    assert paper_plan("arXiv:2410.03065") == paper_plan("2410.03065")
    with pytest.raises(PlanError, match="paper = 'x' is not known"):
        make_plan('paper = "x"\n' + GRID)


def test_the_papers_tables_are_run_at_the_papers_places() -> None:
    plan = paper_plan("2410.03065")
    assert plan.paper in PAPERS
    tables = {t.name: t for t in plan.loading}
    assert list(tables) == ["table 3", "table 5", "table 6", "figure 6"]
    assert set(tables["table 3"].compute_shares) == {0.125, 0.5, 0.875, 1.0}
    assert set(tables["table 3"].bandwidths) == set(tables["table 5"].bandwidths) == set(GBPS)
    ratios = [read_bandwidth(text)[0] / gbps for text, gbps in GBPS.items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)  # 7 : 25 : 32 : 56 : 100
    assert read_bandwidth("0.604x")[0] == pytest.approx(1.59 / 2.63, abs=0.001)
    assert set(tables["table 6"].bandwidths) == {SMALL_KV, LARGE_MODEL}
    assert tables["figure 6"].mixed is not None and tables["figure 6"].mixed.requests == 22
    assert [8 * n for n in tables["table 5"].context_lengths] == [4096, 8192, 12288, 16384]
    assert sum(map(nominal_seconds, expand(plan))) < 470


def test_the_papers_figures_stand_beside_ours(tmp_path: Path) -> None:
    plan = paper_plan("2410.03065")
    assert run_fake(plan, tmp_path / "out").failed == ()
    study = load_study(*StudyFolder.open(tmp_path / "out"))
    compared = compare_paper(study.plan.paper, study.loading)
    assert compared is not None
    paper, found = compared
    assert [c.where for c in found] == ["all", *["table 3"] * 2, *["table 5"] * 4, *["table 6"] * 4, *["figure 6"] * 2]
    assert [c.paper for c in found if "losing point" in c.what] == ["– \\ 0.99", "0.91 \\ –", "0.80 \\ 44.26"]
    f = next(f for f in study.loading if f.place.block == "table 3" and f.place.share == 1 and
             f.place.bandwidth == "0.604x")  # fmt: skip
    gains = [f.speedup("cake(chunk=16)", side) or 0.0 for side in ("load", "compute")]
    assert found[2].ours == f"{gains[0]:.2f} \\ {gains[1]:.2f}"
    page = render(study, judge(study))
    stream = StringIO()
    print_study(Console(width=240, file=stream), study, judge(study))
    for text in (page, stream.getvalue()):
        assert paper.title in text
        assert "delay injection" in text
        assert "44.26" in text
    values = as_values(study, judge(study))
    assert len(values["paper"]["figures"]) == len(found)
    assert compare_paper(None, study.loading) is None and compare_paper("2410.03065", []) is None
