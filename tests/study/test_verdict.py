"""The verdict: the right winner by the right measure, ties called ties, the floor kept, crossovers found."""

from dataclasses import replace

import pytest

from kvwise.study import words
from kvwise.study.bootstrap import Interval
from kvwise.study.estimate import Estimate
from kvwise.study.plan import Plan
from kvwise.study.recommend import Rejection, judge
from kvwise.study.scores import Basis, QualityFigures, TaskFigures
from kvwise.study.summary import Condition, Figures, Study, Who, load_study
from kvwise.study.verdict import Measure, crossovers, decide, reaches
from tests.study.answers import figures_of, make_study, point
from tests.study.conftest import make_plan

FULL, H2O, SMALL = Who("full", None, "full"), Who("h2o", 0.5, "h2o(budget=0.5)"), Who("h2o", 0.1, "h2o(budget=0.1)")
HERE = Condition("main", "m", 128, "auto", float("inf"), 8.0)


def quality(who: Who, score: float | None, error: float = 0.02, basis: Basis = Basis.TASKS) -> QualityFigures:
    found = None if score is None else Estimate(score, error, 400)
    asked = TaskFigures("recall", "multi-turn", 400, 20, found, None, found, Estimate(0.1, 0.01, 400))
    return QualityFigures("m", 128, who, (asked,), found, found, None, {"device": 64.0}, basis)


def figures(
    who: Who, good: Interval, rate: float = 10, latency: float = 1, score: float | None = 1, **more: object
) -> Figures:
    given = figures_of(
        who, 10.0, condition=HERE, goodput=good, request_rate=good, output_rate=point(rate), total_rate=point(rate),
        e2e={50.0: point(latency)}, quality=None if score is None else quality(who, score),
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
    decision = decide([figures(FULL, point(5)), figures(H2O, point(5.1), score=0.5)], plan(tie_margin=0.05))
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


def test_the_quality_floor_changes_the_winner_and_says_who_would_have_won() -> None:
    group = [figures(FULL, point(5)), figures(H2O, point(9), score=0.4), figures(SMALL, point(9), score=None)]
    free = decide(group[:2], plan())
    assert free.winner is not None
    assert (free.winner.who, free.below_floor, free.without_floor) == (H2O, (), None)
    decision = decide(group, plan(min_quality=0.9))
    assert decision.winner is not None
    assert decision.winner.who == FULL
    assert [f.who for f in decision.below_floor] == [H2O, SMALL]
    assert words.without_floor(decision) == "without the floor: tie: h2o 50%, h2o 10%"
    none = decide(group[1:], plan(min_quality=0.9))
    assert words.outcome(none) == "no strategy reaches the quality floor"
    assert none.pick is None
    assert words.without_floor(none).startswith("without the floor: ")


def test_a_floor_that_rejects_only_losers_changes_nothing_but_names_them() -> None:
    group = [figures(FULL, point(9)), figures(H2O, point(5), score=0.4)]
    decision = decide(group, plan(min_quality=0.9))
    assert decision.winner is not None
    assert (decision.winner.who, decision.without_floor) == (FULL, None)
    assert [f.who for f in decision.below_floor] == [H2O]


def test_a_score_at_the_floor_reaches_it_and_what_was_not_measured_reaches_none() -> None:
    assert reaches(quality(H2O, 0.9), 0.9)
    assert not reaches(quality(H2O, 0.8999), 0.9)
    assert not reaches(None, 0.0)
    assert not reaches(quality(H2O, None), 0.0)
    assert reaches(None, None)


def test_whoever_is_left_out_is_told_with_error_and_grounds() -> None:
    given = [
        Rejection("m", H2O, quality(H2O, 0.62, 0.03)),
        Rejection("m", FULL, quality(FULL, 0.88, 0.03)),
        Rejection("m", SMALL, None),
        Rejection("m", SMALL, quality(SMALL, None)),
        Rejection("random:3m", H2O, quality(H2O, 0.62, 0.03, Basis.AGREEMENT)),
    ]
    assert [words.shortfall(r, 0.9) for r in given] == [
        "h2o 50%: score 0.62 ± 0.03",
        "full: score 0.88 ± 0.03, within the error of the floor",
        "h2o 10%: its quality was not measured",
        "h2o 10%: no task of context 128 has right answers that the full cache knows",
        "h2o 50%: agreement 0.62 ± 0.03",
    ]
    grounds = [ground for ground, _ in words.rejections(given, 0.9)]
    assert grounds == [
        "m: right answers over the full cache's, 1 task, 400 answers, context 128",
        "m",
        "3m: most likely tokens that are the full cache's, random prompts, context 128",
    ]


def test_a_recommendation_holds_the_floor_under_every_condition() -> None:
    there = replace(HERE, rate=16.0)
    mine = [figures(FULL, point(5)), figures(H2O, point(9), score=0.95)]
    mine += [figures(FULL, point(5), condition=there), figures(H2O, point(9), score=0.8, condition=there)]
    study = Study("s", plan(), [], [], [], [], [], figures=mine)
    assert [r.figures.who for r in judge(study).recommendations] == [H2O]
    floored = replace(study, plan=plan(min_quality=0.9))
    (advice,) = judge(floored).recommendations
    assert (advice.figures.who, advice.without_floor and advice.without_floor.who) == (FULL, H2O)
    assert [r.who for r in judge(floored).rejections] == [H2O]
    assert words.advice(advice).endswith("; its answers are what quality is measured by")
    (free,) = judge(study).recommendations
    assert "gives 0.95 ± 0.02 of the full cache's right answers (context 128)" in words.advice(free)


def test_without_traffic_the_floor_judges_what_was_measured() -> None:
    study = make_study(plan(min_quality=0.9), live=False)
    verdict = judge(study)
    assert (verdict.decisions, verdict.recommendations) == ((), ())
    below = {q.who.strategy for q in study.qualities if q.score is not None and q.score.value < 0.9}
    assert {r.who.strategy for r in verdict.rejections} == below
    assert 0 < len(below) < len(study.qualities)


def at(rate: float, full: float, h2o: float) -> list[Figures]:
    here = replace(HERE, rate=rate)
    return [
        replace(figures(FULL, point(full)), condition=here),
        replace(figures(H2O, point(h2o), score=0.5), condition=here),
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
    full = {q.who.label: q for q in study.qualities if q.model == "random:3m"}
    assert full["full+prefix"].top1 is not None
    assert full["full+prefix"].top1.value == 1
    assert full["h2o 10%"].top1.value < full["h2o 50%"].top1.value
    assert full["h2o 10%"].kl.value > full["h2o 50%"].kl.value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (12.345, "12.3"), (0.001234, "0.00123"), (99.96, "100"), (float("inf"), "∞")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Estimate(0.756, 0.0213, 9), "0.76 ± 0.02"),
        (Estimate(0.9634, 0.0052, 9), "0.963 ± 0.005"),
        (Estimate(0.0, 0.0048, 9), "0.000 ± 0.005"),
        (Estimate(1.0, 0.0, 9), "1"),
        (None, "–"),
    ],
)
def test_estimates_are_told_with_one_standard_error(found: Estimate | None, text: str) -> None:
    assert words.estimate(found) == text


def test_cut_requests_count_with_the_time_they_waited(opened) -> None:
    from kvwise.study.summary import _with_bounds

    row = {"finish_reason": "cut", "arrival_s": 1.0, "ttft_s": None, "e2e_s": None}
    (bounded,) = _with_bounds([row], 5.0)
    assert (bounded["ttft_s"], bounded["e2e_s"]) == (4.0, 4.0)
    early = row | {"ttft_s": 0.5}
    assert _with_bounds([early], 5.0)[0]["ttft_s"] == 0.5
