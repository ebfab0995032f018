"""Charts of quality hold the figures, guides are guides, and the front is what nobody dominates."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.study.chart import Chart
from kvwise.study.charts import study_charts
from kvwise.study.front_charts import front_charts
from kvwise.study.palette import Palette, plain
from kvwise.study.pareto import front
from kvwise.study.plotly_chart import plotly_chart
from kvwise.study.png import write_png
from kvwise.study.quality_charts import quality_charts
from kvwise.study.quality_looks import AGREEMENT, QUALITY
from kvwise.study.scores import quality_figures
from kvwise.study.summary import Study
from tests.study.answers import (
    BUDGETS,
    CURVES,
    TASKS,
    agreement_rows,
    cell_row,
    held_by,
    make_plan,
    make_study,
    strategies,
)
from tests.study.answers import PLAN as TEXT


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(make_plan(TEXT).model_copy(update={"min_quality": 0.9}))


@pytest.fixture(scope="module")
def charts(study: Study) -> dict[str, Chart]:
    return {chart.id: chart for chart in study_charts(study)}


def test_there_is_a_panel_per_task_and_protocol() -> None:
    both = make_study(live=False, protocols=("multi-turn", "multi-request"))
    titles = [chart.title for chart in quality_charts(both, Palette(both))]
    panels = [f"{task}, {protocol}, builtin:recall, context 512" for protocol in ("multi-turn", "multi-request")
              for task in (*TASKS, "continuation")]  # fmt: skip
    assert titles == [
        "score, builtin:recall, context 512", "score against memory, builtin:recall, context 512", *panels
    ]  # fmt: skip


def test_a_panel_holds_what_the_figures_hold(study: Study, charts: dict[str, Chart]) -> None:
    chart = charts["quality-recall-multi-turn-builtin-recall-512"]
    assert [text for _, text in chart.ticks] == ["50 %", "25 %", "12.5 %", "6 %"]
    known = {(q.who.framework, q.who.budget): q.tasks[0].accuracy for q in study.qualities}
    drawn = {s.label: s for s in chart.series}
    assert set(drawn) == {"full", "window", "random", "h2o", "snapkv", "infinigen", "topk"}
    for name in set(drawn) - {"full"}:
        series = drawn[name]
        for place, budget in enumerate(BUDGETS):
            found = known[name, budget]
            assert found is not None
            assert series.y[place] == found.value
            assert series.low is not None
            assert series.high is not None
            assert (series.low[place], series.high[place]) == (max(found.low, 0), min(found.high, 1))
            assert abs(series.x[place] - place) < 0.1
    assert drawn["full"].y == (1.0, 1.0)
    assert {s.label for s in chart.series if s.guide} == {"window", "random"}
    assert "±1.96 standard errors" in chart.note


def test_nats_are_drawn_where_nothing_is_right_or_wrong(charts: dict[str, Chart]) -> None:
    chart = charts["quality-continuation-multi-turn-builtin-recall-512"]
    assert chart.y_label == "nats per token (less is better)"
    ends = {s.label: s.y[-1] for s in chart.series}
    assert ends["h2o"] > ends["window"] > ends["topk"] > ends["full"]


def test_guides_are_dashed_and_grey_on_the_page(charts: dict[str, Chart]) -> None:
    traces = plotly_chart(charts["quality-recall-multi-turn-builtin-recall-512"])["data"]
    dashed = {t["name"]: t["line"]["dash"] for t in traces}
    assert {name for name, dash in dashed.items() if dash != "solid"} == {"window", "random"}


def test_memory_is_read_off_the_device_and_the_rest_is_told(study: Study, charts: dict[str, Chart]) -> None:
    chart = charts["quality-bytes-builtin-recall-512"]
    assert (chart.log_x, chart.reverse_x) == (True, True)
    infinigen = next(s for s in chart.series if s.label == "infinigen")
    assert infinigen.x == tuple(512 * (0.04 + budget / 8) for budget in BUDGETS)
    assert all("512 B host" in name for name in infinigen.names)
    assert "not on this axis, per token on the host: infinigen 512 B" in chart.note
    assert plotly_chart(chart)["layout"]["xaxis"]["autorange"] == "reversed"


def test_the_front_has_a_point_per_strategy_at_the_hardest_condition(study: Study) -> None:
    (chart,) = front_charts(study, Palette(study))
    assert "at 16 req/s" in chart.title
    points = {(s.label, c): (x, y, empty) for s in chart.series if s.label
              for c, x, y, empty in zip(s.captions, s.x, s.y, s.hollow, strict=True)}  # fmt: skip
    here = [f for f in study.figures if f.condition.rate == 16.0]
    assert len(points) == len(here) == 9
    best = front([(f.output_rate.value, f.quality.score.value, -f.mean_kv["device"]) for f in here])
    for f, flag in zip(here, best, strict=True):
        budget = "" if f.who.budget is None else f"{f.who.budget * 100:g} %"
        assert points[f.who.framework, budget] == (f.output_rate.value, f.quality.score.value, not flag)
    line = chart.series[0]
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)
    assert [rule.y for rule in chart.rules] == [0.9]


def test_dominated_points_are_hollow(study: Study) -> None:
    (chart,) = front_charts(study, Palette(study))
    symbols = {t["name"]: t["marker"]["symbol"] for t in plotly_chart(chart)["data"] if t["name"]}
    # The full cache is slower and larger than InfiniGen at one half, which answers as well.
    assert symbols["full"] == ["circle-open"]
    assert "circle" in symbols["h2o"]


points = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_nobody_dominates(drawn: list[tuple[float, ...]]) -> None:
    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    flags = front(drawn)
    kept = [p for p, flag in zip(drawn, flags, strict=True) if flag]
    assert kept
    assert not any(beats(a, b) for a in kept for b in kept)
    assert all(any(beats(a, p) for a in kept) for p, flag in zip(drawn, flags, strict=True) if not flag)
    assert front(drawn[::-1]) == flags[::-1]


def test_models_without_tasks_have_agreement_and_no_quality() -> None:
    chosen = list(strategies({k: v for k, v in CURVES.items() if k.startswith("h2o")}))
    rows = [row for who, _ in chosen for row in agreement_rows(who, "random:3m")]
    cells = [cell_row(who, held_by(who), model="random:3m", context=256) for who, _ in chosen]
    given = Study("s", make_plan(TEXT), cells, [], [], rows, [], qualities=quality_figures(rows, cells))
    found = study_charts(given)
    assert {chart.section for chart in found} == {AGREEMENT}
    assert [chart.id for chart in found] == [
        "agreement-top-1-random-3m-256", "agreement-kl-random-3m-256", "quality-bytes-random-3m-256"
    ]  # fmt: skip
    assert all(value <= 1.0 for chart in found[::2] for s in chart.series for value in s.high or ())


def test_every_chart_becomes_a_picture(charts: dict[str, Chart], tmp_path: Path) -> None:
    for name in ("quality-front-main-builtin-recall", "quality-bytes-builtin-recall-512"):
        write_png(charts[name], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert charts["quality-front-main-builtin-recall"].section == QUALITY


def test_long_names_become_labels() -> None:
    assert plain("h2o(normalised=true)") == "h2o normalised"
    assert plain("h2o") == "h2o"
