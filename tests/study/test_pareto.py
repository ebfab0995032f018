"""The Pareto set is what nobody beats; errors let stand who is not shown to be beaten; page and JSON name it."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.study.bytes_charts import bytes_charts
from kvwise.study.chart import Series
from kvwise.study.estimate import Estimate
from kvwise.study.page import render
from kvwise.study.palette import Palette
from kvwise.study.pareto import Bytes, Point, Standing, front_of, pareto
from kvwise.study.pareto_page import pareto_values, sentences
from kvwise.study.recommend import judge
from kvwise.study.scores import QualityFigures, attested
from kvwise.study.summary import Study
from kvwise.study.table import as_values
from kvwise.study.who import Who
from tests.study.answers import make_study


def figure(name: str, score: float, error: float, device: float, host: float = 0.0) -> QualityFigures:
    held = {"device": device, "host": host} if host else {"device": device}
    return QualityFigures(
        "m", 512, Who(name, None, name), (), Estimate(score, error, 100), None, None, kv_bytes_per_token=held
    )


HERE = [
    figure("full", 1.0, 0.0, 1000),
    figure("int8", 1.0, 0.001, 550),  # as good as full in fewer bytes
    figure("int4", 0.99, 0.004, 300),
    figure("kivi", 0.80, 0.01, 200),
    figure("close", 0.79, 0.01, 210),  # beaten by kivi in both, but not beyond the error
    figure("h2o", 0.35, 0.01, 240),  # beaten by kivi beyond it
    figure("topk", 1.0, 0.001, 150, host=1000),
    figure("tiny", 0.05, 0.01, 20),
]


def standings(count: Bytes) -> dict[str, Point]:
    return {p.quality.who.framework: p for p in pareto(HERE, count)}


def test_the_front_counts_the_bytes_on_the_device() -> None:
    found = standings(Bytes.DEVICE)
    assert [name for name, p in found.items() if p.standing is Standing.ON] == ["topk", "tiny"]
    # Nobody is better than those that lose nothing, whatever they hold.
    assert {name for name, p in found.items() if p.standing is Standing.WITHIN} == {"full", "int8"}
    beaten = {name: p.beaten_by.who.framework for name, p in found.items() if p.beaten_by is not None}
    assert beaten == dict.fromkeys(("int4", "kivi", "close", "h2o"), "topk")


def test_what_waits_in_other_tiers_counts_where_all_are_counted() -> None:
    found = standings(Bytes.ALL)
    assert list(found) == ["topk", "full", "int8", "int4", "h2o", "close", "kivi", "tiny"]
    assert [p.quality.who.framework for p in front_of(list(found.values()))] == ["int8", "int4", "kivi", "tiny"]
    assert {name for name, p in found.items() if p.standing is Standing.WITHIN} == {"topk", "full", "close"}
    assert found["h2o"].beaten_by is not None and found["h2o"].beaten_by.who.framework == "kivi"


def test_a_hair_of_bytes_makes_no_front() -> None:
    found = pareto([figure("h2o", 0.3, 0.01, 126.4), figure("cascading", 0.1, 0.01, 126.2)], Bytes.DEVICE)
    assert {p.quality.who.framework: p.standing for p in found} == {"h2o": Standing.ON, "cascading": Standing.OFF}
    alike = pareto([figure("a", 0.3, 0.01, 126.4), figure("b", 0.3, 0.01, 126.2)], Bytes.DEVICE)
    assert [p.standing for p in alike] == [Standing.ON, Standing.ON]


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=12)


@given(points)
def test_standings_are_what_the_definition_says(drawn: list[tuple[int, int, int]]) -> None:
    here = [figure(f"s{i}", s / 5, e / 10, float(b)) for i, (s, e, b) in enumerate(drawn)]
    found = pareto(here, Bytes.DEVICE)
    assert len(found) == len(here)
    assert front_of(found)
    for p in found:
        beaten = any((o.num_bytes <= p.num_bytes and o.score.value >= p.score.value)
                     and (o.num_bytes, o.score.value) != (p.num_bytes, p.score.value) for o in found)  # fmt: skip
        clear = [o for o in found if o.num_bytes <= p.num_bytes
                 and o.score.value - p.score.value > 1.96 * math.hypot(o.score.error, p.score.error)]  # fmt: skip
        expected = Standing.OFF if clear else Standing.WITHIN if beaten else Standing.ON
        assert p.standing is expected
        assert (p.beaten_by is None) == (not clear)
        if p.beaten_by is not None and p.beaten_by.score is not None:
            assert p.beaten_by.score.value == max(o.score.value for o in clear)


def test_the_sentence_names_the_set() -> None:
    first, second, third, fourth = sentences(HERE)
    assert first == (
        "score against bytes per token on the device: 2 of 8 strategies are on the front, from many bytes to few: "
        "topk (150 B, 1.000 ± 0.001), tiny (20 B, 0.05 ± 0.01)"
    )
    assert second.endswith("beats beyond the error: full, int8")
    assert "in all tiers: 4 of 8" in third
    assert fourth.endswith(": topk, full, close")


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(live=False)


def test_the_page_has_sentence_table_and_numbers(study: Study) -> None:
    page = render(study, judge(study))
    text = re.sub(r"<[^>]+>", " ", page.split("<script")[0])
    assert "Pareto set" in text
    assert "strategies are on the front, from many bytes to few" in text
    assert "within the error" in text
    front = front_of(pareto(study.qualities, Bytes.DEVICE))
    for number, point in enumerate(front, start=1):
        assert f"<b>{number}</b>" in page
        assert point.quality.who.label in text


def test_the_summary_has_every_strategys_standing(study: Study) -> None:
    values = json.loads(json.dumps(as_values(study, judge(study))))["pareto"]
    assert len(values) == 2 * len(study.qualities)
    assert values == pareto_values(study.qualities)
    assert {v["bytes"] for v in values} == {"on the device", "in all tiers"}
    known = {q.who.strategy: q for q in study.qualities}
    for v in values:
        held = known[v["strategy"]].kv_bytes_per_token
        assert v["bytes_per_token"] == (held["device"] if v["bytes"] == "on the device" else sum(held.values()))
        assert (v["beaten_by"] is None) == (v["on_the_front"] != "no")


def test_the_chart_draws_the_front_and_fills_its_points(study: Study) -> None:
    (chart,) = bytes_charts(Palette(study), study.qualities, study.qualities, ())
    line, *series = chart.series
    found = pareto(study.qualities, Bytes.DEVICE)
    corners = [(p.num_bytes, p.score.value) for p in front_of(found)]
    assert set(corners) <= set(zip(line.x, line.y, strict=True))
    assert list(line.x) == sorted(line.x, reverse=True)
    filled = {xy for s in series for xy in _filled(s)}
    assert filled == set(corners)


def _filled(series: Series) -> set[tuple[float, float]]:
    return {(x, y) for x, y, hollow in zip(series.x, series.y, series.hollow, strict=True) if not hollow}


def test_strategies_that_hold_alike_have_no_front() -> None:
    assert list(sentences([figure("a", 1.0, 0.0, 10), figure("b", 0.5, 0.1, 10)])) == []


def test_attested_shares_are_of_all_places() -> None:
    row = {"num_heads": 8, "tokens_seen": 100, "tokens_dropped": 400, "tokens_merged": 200, "tokens_fetched": 30,
           "fetch_candidates": 120, "tokens_reused": 50, "bits_per_element": 5.5, "bytes_freed": 6400}  # fmt: skip
    told = attested(row)
    assert told is not None
    assert (told.kept, told.dropped, told.merged) == (0.25, 0.5, 0.25)
    assert (told.read, told.reused, told.bits_per_element, told.freed) == (0.25, 0.5, 5.5, 64.0)
    assert attested(dict.fromkeys(row)) is None
    none_fetched = attested(row | {"fetch_candidates": 0, "tokens_fetched": 0})
    assert none_fetched is not None and none_fetched.read is None
