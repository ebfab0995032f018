"""Intervals: numpy's percentiles inside, true values covered about as often as promised."""

import numpy as np
import pytest

from kvwise.study.bootstrap import Interval, mean, percentiles, rate


def test_values_are_those_of_numpy() -> None:
    groups = [np.array([3.0, 1.0, 2.0]), np.array([10.0]), np.array([])]
    found = percentiles(groups, (50.0, 90.0), seed=0)
    together = np.concatenate(groups)
    for q, interval in found.items():
        assert interval.value == np.percentile(together, q)
        assert interval.low <= interval.value <= interval.high
    assert mean(groups, seed=0).value == together.mean()
    assert rate([np.array([1.0, 1, 0]), np.array([1.0])], [2.0, 1.0], seed=0).value == 1.0


def test_no_values_give_no_percentiles_and_no_requests_rate_zero() -> None:
    assert percentiles([], (50.0,), seed=0) == {}
    assert percentiles([np.array([])], (50.0,), seed=0) == {}
    assert rate([np.array([])], [1.0], seed=0) == Interval(0, 0, 0)
    with pytest.raises(ValueError, match="no values"):
        mean([], seed=0)


def test_the_same_seed_gives_the_same_interval() -> None:
    groups = [np.random.default_rng(1).exponential(size=30)]
    assert percentiles(groups, (99.0,), seed=4) == percentiles(groups, (99.0,), seed=4)
    assert percentiles(groups, (50.0,), seed=4) != percentiles(groups, (50.0,), seed=5)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        interval = percentiles([rng.normal(size=40)], (50.0,), seed=0)[50.0]
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_difference_between_repeats_widens_the_interval() -> None:
    alike = rate([np.ones(20), np.ones(20)], [1.0, 1.0], seed=0)
    apart = rate([np.ones(20), np.ones(20)], [1.0, 2.0], seed=0)
    assert alike.low == alike.high == 20
    assert (apart.low, apart.high) == (10, 20)
    values = [np.full(20, 1.0), np.full(20, 3.0)]
    assert mean(values, seed=0).low == 1.0
    assert mean(values, seed=0).high == 3.0


def test_intervals_overlap_or_not() -> None:
    assert Interval(1, 0, 2).overlaps(Interval(3, 2, 4))
    assert not Interval(1, 0, 2).overlaps(Interval(3, 2.1, 4))


def test_many_values_are_resampled_in_bounded_time() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    assert percentiles([values], (50.0,), seed=0)[50.0].value == np.percentile(values, 50)
