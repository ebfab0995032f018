"""Arrivals: the asked rate exactly, the asked burstiness about."""

import math

import numpy as np
import pytest

from kvwise.study.arrivals import arrival_times, spread_ties


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_coefficient_of_variation_of_their_law(burstiness: float) -> None:
    times = arrival_times(20_000, 5.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(20_000 / 5)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_at_rate_inf_all_come_at_once() -> None:
    assert arrival_times(4, math.inf, 1.0, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


def test_ties_are_spread_in_order() -> None:
    assert spread_ties(np.array([0.0, 0, 0, 3, 6, 6]), 3.0).tolist() == [0, 1, 2, 3, 6, 7.5]
