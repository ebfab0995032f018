"""Scores: accuracy over the full cache's, paired; what the full cache does not know itself enters none."""

from collections.abc import Sequence

import pytest

from kvwise.study import estimate
from kvwise.study.estimate import Estimate
from kvwise.study.rows import Row
from kvwise.study.scores import AGREEMENT, Basis, QualityFigures, quality_figures
from kvwise.study.who import Who

FULL, H2O = Who("full", None, "full"), Who("h2o", 0.2, "h2o(budget=0.2)")


def rows(who: Who, task: str, right: Sequence[float | None], protocol: str = "multi-turn", **more: object) -> list[Row]:
    """Answers by two to an episode."""
    return [
        {
            "cell": who.strategy, "model": "m", "context": 128, "strategy": who.strategy, "framework": who.framework,
            "budget": who.budget, "task": task, "protocol": protocol, "episode": i // 2, "question": i % 2,
            "num_tokens": 3, "right": None if r is None else bool(r), "score": None, "nll_nats": 0.5,
            "same_top1": 0.5, "kl_nats": 0.1 * i, "depth": 0.5,
        } | more
        for i, r in enumerate(right)
    ]  # fmt: skip


def figures(answers: list[Row], who: Who = H2O) -> QualityFigures:
    cells = [{"cell": w.strategy, "kv_bytes_per_token": [("device", 7.0)]} for w in (FULL, H2O)]
    return next(q for q in quality_figures(answers, cells) if q.who == who)


def test_the_score_is_the_mean_ratio_to_the_full_cache_of_the_same_answers() -> None:
    full_a, mine_a = [1, 1, 1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 0, 0, 0]
    full_b, mine_b = [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]
    answers = [*rows(FULL, "a", full_a), *rows(FULL, "b", full_b), *rows(H2O, "a", mine_a), *rows(H2O, "b", mine_b)]
    found = figures(answers)
    ratios = [
        estimate.ratio(mine_a, full_a, [i // 2 for i in range(8)]),
        estimate.ratio(mine_b, full_b, [i // 2 for i in range(6)]),
    ]
    assert found.score is not None
    assert found.score.value == pytest.approx((3 / 7 + 4 / 5) / 2)
    assert found.score == estimate.average([[r] for r in ratios])
    assert (found.basis, found.left_out, found.kv_bytes_per_token) == (Basis.TASKS, (), {"device": 7.0})
    a, b = found.tasks
    assert a.accuracy == estimate.share(mine_a, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (a.num_answers, a.num_episodes, b.num_answers, b.num_episodes) == (8, 4, 6, 3)
    # Rows in another order are the same answers.
    assert figures(answers[::-1]).score == found.score


def test_the_full_cache_is_one_by_definition() -> None:
    found = figures(rows(FULL, "a", [1, 1, 0, 1], kl_nats=0.0, same_top1=1.0), FULL)
    assert (found.score, found.top1, found.kl) == (Estimate(1, 0, 4), Estimate(1, 0, 4), Estimate(0, 0, 4))
    assert found.tasks[0].accuracy is not None
    assert found.tasks[0].accuracy.value == 0.75


def test_tasks_the_full_cache_does_not_know_enter_no_score_and_are_named() -> None:
    answers = [
        *rows(FULL, "a", [1, 1]), *rows(FULL, "hard", [1, 0, 0, 0]), *rows(FULL, "even", [1, 0]),
        *rows(H2O, "a", [1, 0]), *rows(H2O, "hard", [0, 0, 0, 0]), *rows(H2O, "even", [1, 0]),
    ]  # fmt: skip
    found = figures(answers)
    assert found.score is not None
    assert found.score.value == pytest.approx((0.5 + 1) / 2)
    assert found.left_out == figures(answers, FULL).left_out == ("hard",)
    nothing = figures([r for r in answers if r["task"] == "hard"])
    assert (nothing.score, nothing.basis) == (None, Basis.TASKS)


def test_without_the_full_cache_there_is_no_score() -> None:
    found = figures(rows(H2O, "a", [1, 1, 0, 1]))
    assert found.score is None
    assert found.tasks[0].accuracy is not None


def test_continuation_enters_no_score() -> None:
    answers = [*rows(FULL, "a", [1, 1]), *rows(H2O, "a", [1, 1])]
    both = [*answers, *rows(FULL, "continuation", [None] * 4), *rows(H2O, "continuation", [None] * 4)]
    assert figures(both).score == figures(answers).score
    told = figures(both).tasks[1]
    assert told.accuracy is None
    assert told.nll is not None and told.nll.value == 0.5
    assert figures(both).left_out == ()


def test_protocols_on_the_same_episodes_are_not_taken_as_independent() -> None:
    answers = [*rows(FULL, "a", [1] * 8), *rows(H2O, "a", [1, 0, 0, 1, 1, 1, 0, 1])]
    once = figures(answers)
    twice = figures([*answers, *(r | {"protocol": "multi-request"} for r in answers)])
    assert (len(once.tasks), len(twice.tasks)) == (1, 2)
    assert once.score is not None and twice.score is not None
    assert (twice.score.value, twice.score.error) == pytest.approx((once.score.value, once.score.error))


def test_agreement_is_the_score_of_a_model_without_tasks() -> None:
    forced = {"nll_nats": None, "same_top1": 0.75}
    answers = [
        *rows(FULL, AGREEMENT, [None] * 4, "forced", **forced),
        *rows(H2O, AGREEMENT, [None] * 4, "forced", **forced),
    ]
    found = figures(answers)
    assert found.basis == "agreement"
    assert found.score == found.top1
    assert found.score is not None and found.score.value == 0.75
    # Twelve tokens were compared, not four.
    assert found.score.error == pytest.approx(estimate.agresti_coull(0.75, 12))
    assert found.tasks[0].accuracy is None and found.tasks[0].nll is None


def test_records_are_scored_and_have_no_agreement() -> None:
    free = {"nll_nats": None, "same_top1": None, "kl_nats": None}

    def scored(who: Who, *scores: float) -> list[Row]:
        return [r | {"score": s} for r, s in zip(rows(who, "set/x", [None] * len(scores), **free), scores, strict=True)]

    found = figures([*scored(FULL, 0.5, 0.2, 0.2, 0.3), *scored(H2O, 0.1, 0.2, 0.1, 0.2)])
    assert found.score is not None
    assert found.score.value == pytest.approx(0.5)
    assert found.tasks[0].accuracy is not None and found.tasks[0].accuracy.value == pytest.approx(0.15)
    assert (found.top1, found.kl, found.tasks[0].top1) == (None, None, None)
    assert figures([*scored(FULL, 0.1, 0.0), *scored(H2O, 0.1, 0.0)]).left_out == ("set/x",)
