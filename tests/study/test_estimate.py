"""Estimates: errors that know which answers belong together, checked by hand and by simulation."""

import math

import numpy as np
import pytest

from kvwise.study import estimate
from kvwise.study.estimate import Estimate


def test_errors_are_clustered_as_by_hand() -> None:
    # Episodes (1, 1), (1, 0), (0, 0): mean 1/2, sums of residuals 1, 0, -1; variance 3/2 * 2 / 6^2.
    found = estimate.mean([1, 1, 1, 0, 0, 0], "aabbcc")
    assert (found.value, found.count) == (0.5, 6)
    assert found.error == pytest.approx(math.sqrt(3 / 2 * 2 / 36))
    assert found.low == pytest.approx(0.5 - 1.96 * found.error)
    assert found.high == pytest.approx(0.5 + 1.96 * found.error)
    assert estimate.share([1, 1, 1, 0, 0, 0], "aabbcc").error == found.error


def test_answers_that_stand_alone_have_the_error_of_a_mean() -> None:
    values = [0.3, 1.2, 0.9, 2.0]
    expected = np.std(values, ddof=1) / 2
    assert estimate.mean(values, range(4)).error == pytest.approx(expected)
    assert estimate.mean(values, "aaaa").error == pytest.approx(expected)  # one episode: nothing to cluster by


def test_episodes_that_repeat_one_answer_count_once() -> None:
    alone = estimate.mean([1, 0, 1, 0, 0], "abcde")
    thrice = estimate.mean([1, 0, 1, 0, 0] * 3, "abcde" * 3)
    assert thrice.error == pytest.approx(alone.error)


def test_few_answers_that_are_all_right_are_not_certain() -> None:
    assert estimate.mean([1.0] * 12, [0] * 6 + [1] * 6).error == 0
    sure = estimate.share([1.0] * 12, [0] * 6 + [1] * 6)
    assert sure.error == pytest.approx(math.sqrt(14 / 16 * 2 / 16 / 16))
    assert estimate.share([1.0] * 120, list(range(120))).error < sure.error / 5
    assert estimate.share([1.0] * 12, list(range(12)), trials=120).error < sure.error / 5
    assert estimate.mean([0.7], "a") == Estimate(0.7, 0.7, 1)


def test_a_ratio_is_paired_by_answer_and_clustered_by_episode() -> None:
    ours, theirs, episodes = [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], "aabbcc"
    # 3/5; residuals ours - 3/5 theirs per episode: -0.2, 0.8, -0.6; over 6 * 5/6.
    found = estimate.ratio(ours, theirs, episodes)
    assert found.value == pytest.approx(0.6)
    assert found.error == pytest.approx(math.sqrt(3 / 2 * (0.04 + 0.64 + 0.36)) / 5)
    # Wrong together is no difference: the error is far below that of two accuracies of one half.
    same = estimate.ratio([1, 0] * 50, [1, 0] * 50, range(100))
    assert same.value == 1
    assert same.error == pytest.approx(2 * estimate.agresti_coull(0, 100))


def test_the_errors_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = {"share": 0, "ratio": 0}
    for _ in range(400):
        # 20 episodes of 6 questions; the questions of an episode are easy or hard together.
        easy = rng.beta(2, 2, size=20).repeat(6)
        full = rng.random(120) < 0.9
        mine = full & (rng.random(120) < easy)
        episodes = np.arange(20).repeat(6).tolist()
        found = estimate.share(mine.tolist(), episodes)
        hits["share"] += found.low <= 0.45 <= found.high
        found = estimate.ratio(mine.tolist(), full.tolist(), episodes)
        hits["ratio"] += found.low <= 0.5 <= found.high
    assert all(0.90 <= count / 400 <= 0.98 for count in hits.values()), hits


def test_an_average_takes_groups_as_independent_and_their_members_as_not() -> None:
    a, b, c = Estimate(0.2, 0.03, 10), Estimate(0.4, 0.04, 20), Estimate(0.9, 0.1, 30)
    found = estimate.average([[a, b], [c]])
    assert found.value == pytest.approx(0.5)
    assert found.error == pytest.approx(math.sqrt(0.07**2 + 0.1**2) / 3)
    assert found.count == 60


@pytest.mark.parametrize(
    "call",
    [
        lambda: estimate.mean([], []),
        lambda: estimate.mean([1.0, 0.0], [0]),
        lambda: estimate.ratio([1.0], [1.0, 0.0], [0]),
        lambda: estimate.ratio([1.0], [0.0], [0]),
        lambda: estimate.average([]),
    ],
)
def test_what_has_no_mean_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"mean of no|clusters|same questions|all wrong"):
        call()  # type: ignore[operator]
