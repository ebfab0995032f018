"""The verdict: the right winner by the right measure, ties called ties, the floor kept, crossovers found."""

from dataclasses import replace

import pytest

from kvwise.study import words
from kvwise.study.bootstrap import Interval
from kvwise.study.plan import Plan
from kvwise.study.recommend import judge
from kvwise.study.summary import Condition, Figures, Study, Who, load_study
from kvwise.study.verdict import Measure, crossovers, decide
from tests.study.conftest import make_plan

FULL, H2O, SMALL = Who("full", None, "full"), Who("h2o", 0.5, "h2o(budget=0.5)"), Who("h2o", 0.1, "h2o(budget=0.1)")
HERE = Condition("main", "m", 128, "auto", float("inf"), 8.0)


def point(value: float, width: float = 0.0) -> Interval:
    return Interval(value, value - width, value + width)


def figures(
    who: Who, good: Interval, rate: float = 10, latency: float = 1, agree: float | None = 1, **more: object
) -> Figures:
    given = Figures(
        condition=HERE, who=who, repeats=2, num_requests=10, num_finished=10, num_cut=0, goodput=good,
        request_rate=good, output_rate=point(rate), total_rate=point(rate), attainment=1.0, ttft={}, tpot={}, itl={},
        e2e={50.0: point(latency)}, peak_kv={"device": 100.0}, mean_kv={"device": 50.0}, pool_bytes=1000,
        hit_ratio=None, preemptions=0, links={}, agreement=None if agree is None else point(agree),
    )  # fmt: skip
    return replace(given, **more)  # type: ignore[arg-type]


def plan(**changes: object) -> Plan:
    return make_plan().model_copy(update=changes)


def test_goodput_decides_first() -> None:
    decision = decide([figures(FULL, point(5, 0.5)), figures(H2O, point(9, 0.5), rate=1)], plan())
    assert decision.winner is not None
    assert (decision.winner.who, decision.by) == (H2O, Measure.GOODPUT)
    assert words.outcome(decision) == "h2o 50%: 9 (8.5–9.5) good req/s, next full 5 (4.5–5.5)"
    assert words.factor(decision) == "1.80×"


def test_overlapping_intervals_tie_and_the_next_measure_decides() -> None:
    both = [figures(FULL, point(5, 3), rate=30), figures(H2O, point(6, 3), rate=20)]
    decision = decide(both, plan())
    assert decision.winner is not None
    assert (decision.winner.who, decision.by) == (FULL, Measure.THROUGHPUT)
    faster = [figures(FULL, point(5), latency=0.2), figures(H2O, point(5), latency=0.1)]
    decision = decide(faster, plan())
    assert decision.winner is not None
    assert (decision.winner.who, decision.by) == (H2O, Measure.LATENCY)
    assert words.factor(decision) == "2.00×"


def test_small_differences_tie_however_narrow_the_intervals() -> None:
    decision = decide([figures(FULL, point(5)), figures(H2O, point(5.1), agree=0.5)], plan(tie_margin=0.05))
    assert decision.winner is None
    assert [f.who for f in decision.tied] == [H2O, FULL]
    assert decision.pick is not None
    assert decision.pick.who == FULL
    assert words.outcome(decision) == "tie: h2o 50%, full"


def test_one_repeat_needs_twice_the_margin() -> None:
    pair = [figures(FULL, point(5)), figures(H2O, point(5.4))]
    assert decide(pair, plan()).winner is not None
    once = [replace(f, repeats=1) for f in pair]
    assert decide(once, plan()).winner is None


def test_without_service_levels_throughput_decides() -> None:
    slo = make_plan().slo.model_copy(update={"ttft_ms": None, "tpot_ms": None})
    decision = decide([figures(FULL, point(9), rate=5), figures(H2O, point(1), rate=50)], plan(slo=slo))
    assert decision.by is Measure.THROUGHPUT


def test_strategies_below_the_agreement_floor_do_not_win() -> None:
    group = [figures(FULL, point(5)), figures(H2O, point(9), agree=0.4), figures(SMALL, point(9), agree=None)]
    decision = decide(group, plan(agreement_floor=0.9))
    assert decision.winner is not None
    assert decision.winner.who == FULL
    assert [f.who for f in decision.below_floor] == [H2O, SMALL]
    none = decide(group[1:], plan(agreement_floor=0.9))
    assert words.outcome(none) == "no strategy reaches the agreement floor"
    assert none.pick is None


def at(rate: float, full: float, h2o: float) -> list[Figures]:
    here = replace(HERE, rate=rate)
    return [
        replace(figures(FULL, point(full)), condition=here),
        replace(figures(H2O, point(h2o), agree=0.5), condition=here),
    ]


def test_a_crossover_is_where_the_winner_changes() -> None:
    decisions = [decide(at(*given), plan()) for given in ((4, 4, 2), (16, 8, 12), (8, 7, 3))]
    (found,) = crossovers(decisions)
    assert (found.axis, found.before.condition.rate, found.after.condition.rate) == ("rate", 8, 16)
    assert "block main, along the request rate: full at 8 req/s, then h2o 50% at 16 req/s" in words.crossover(found)


def test_a_winner_that_then_only_ties_is_a_crossover_too() -> None:
    decisions = [decide(at(*given), plan()) for given in ((4, 5, 9), (8, 5, 5))]
    (found,) = crossovers(decisions)
    assert "then a tie of full, h2o 50%" in words.crossover(found)
    assert crossovers([decide(at(*given), plan()) for given in ((4, 9, 5), (8, 5, 5))]) == []


def test_the_whole_study_is_judged(opened) -> None:
    study: Study = load_study(*opened)
    verdict = judge(study)
    assert len(verdict.decisions) == len({f.condition for f in study.figures}) == 8
    assert [d.condition.block for d in verdict.decisions] == ["main"] * 4 + ["memory"] * 4
    assert [r.model for r in verdict.recommendations] == ["random:3m", "random:13m"]
    for advice in verdict.recommendations:
        assert advice.command.startswith(f"kvwise generate --model {advice.model} --strategy ")
        assert 0 < advice.share <= 1


def test_figures_add_up(opened) -> None:
    study = load_study(*opened)
    for f in study.figures:
        assert f.num_finished <= f.num_requests
        assert f.goodput.value <= f.request_rate.value + 1e-9
        assert f.output_rate.value < f.total_rate.value
        assert f.ttft[50.0].value <= f.ttft[99.0].value <= f.e2e[99.0].value
    full = {a.who.label: a for a in study.agreements if a.model == "random:3m"}
    assert full["full+prefix"].top1.value == 1
    assert full["h2o 10%"].top1.value < full["h2o 50%"].top1.value
    assert full["h2o 10%"].kl.value > full["h2o 50%"].kl.value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (12.345, "12.3"), (0.001234, "0.00123"), (99.96, "100"), (float("inf"), "∞")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


def test_cut_requests_count_with_the_time_they_waited(opened) -> None:
    from kvwise.study.summary import _with_bounds

    row = {"finish_reason": "cut", "arrival_s": 1.0, "ttft_s": None, "e2e_s": None}
    (bounded,) = _with_bounds([row], 5.0)
    assert (bounded["ttft_s"], bounded["e2e_s"]) == (4.0, 4.0)
    early = row | {"ttft_s": 0.5}
    assert _with_bounds([early], 5.0)[0]["ttft_s"] == 0.5
