"""Estimates of links and prefill: right on clean data, calm about outliers, quick to follow a change of speed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.methods.loading.estimate import Hindsight, LinkEstimate, PrefillEstimate, regret

FACTORS = pytest.mark.parametrize("factor", [100.0, 0.01])


# -- links ------------------------------------------------------------------------------------------------------


def feed(link: LinkEstimate, rng: np.random.Generator, count: int, latency: float, speed: float, noise: float) -> None:
    for _ in range(count):
        num_bytes = int(10 ** rng.uniform(4, 7))
        link.observe(num_bytes, (latency + num_bytes / speed) * float(np.exp(rng.normal(0, noise))))


def test_a_link_is_unknown_before_its_first_transfer() -> None:
    link = LinkEstimate()
    assert link.seconds(1000) is None
    link.observe(1000, 2.0)
    assert link.seconds(1000) == pytest.approx(2.0)
    assert link.seconds(500) == pytest.approx(1.0), "of one size all is taken for bandwidth"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("speed", "share"), [(1e5, 0.0), (1e8, 0.1), (1e9, 1.0), (1e11, 30.0)])
def test_latency_and_bandwidth_are_told_apart(seed: int, speed: float, share: float) -> None:
    link, latency = LinkEstimate(), share * 1e6 / speed
    feed(link, np.random.default_rng(seed), 12, latency, speed, 0.0)
    for num_bytes in (10**4, 10**5, 10**6, 10**7):
        assert link.seconds(num_bytes) == pytest.approx(latency + num_bytes / speed, rel=0.15)


@FACTORS
@pytest.mark.parametrize("latency", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("seed", range(12))
def test_a_link_that_changes_a_hundredfold_is_followed_within_twenty_transfers(
    factor: float, seed: int, latency: float
) -> None:
    rng, link = np.random.default_rng(seed), LinkEstimate()
    feed(link, rng, 50, latency, 1e8, 0.1)
    feed(link, rng, 20, latency / factor, 1e8 * factor, 0.1)
    for num_bytes in (10**5, 10**6):
        assert link.seconds(num_bytes) == pytest.approx((latency + num_bytes / 1e8) / factor, rel=0.35)


@FACTORS
def test_equal_transfers_are_followed_in_seven(factor: float) -> None:
    link = LinkEstimate()
    for _ in range(50):
        link.observe(10**6, 1.0)
    for _ in range(7):
        link.observe(10**6, factor)
    assert link.seconds(10**6) == pytest.approx(factor)


def test_outliers_move_nothing() -> None:
    """A quarter of the transfers are off by about a hundred, among sizes over three decades."""
    for seed in range(400):
        rng, link = np.random.default_rng(seed), LinkEstimate()
        feed(link, rng, 9, 1e-3, 1e8, 0.02)
        feed(link, rng, 3, 1.0, 1e6, 0.5)
        assert link.seconds(10**6) == pytest.approx(1e-3 + 1e-2, rel=0.15)


def test_more_bytes_never_take_less() -> None:
    rng, link = np.random.default_rng(3), LinkEstimate()
    for _ in range(40):
        link.observe(int(rng.integers(1, 10**6)), float(rng.exponential()))
        times = [link.seconds(n) for n in (0, 1, 10**3, 10**9)]
        assert all(0 <= a <= b < float("inf") for a, b in pairwise(t for t in times if t is not None))


def test_a_link_that_nobody_tries_is_tried_again() -> None:
    link = LinkEstimate(patience=3)
    link.observe(1000, 60.0)
    for _ in range(2):
        link.skipped()
        assert link.seconds(1000) == pytest.approx(60.0)
    link.skipped()
    assert link.seconds(1000) is None
    link.observe(1000, 60.0)
    assert link.seconds(1000) == pytest.approx(60.0)


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 1.0), (-1, 1.0), (1, -1.0), (1, np.nan), (1, np.inf)])
def test_what_is_no_transfer_is_refused(num_bytes: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="no transfer"):
        LinkEstimate().observe(num_bytes, seconds)


def test_a_transfer_too_short_for_the_clock_counts() -> None:
    link = LinkEstimate()
    link.observe(1000, 0.0)
    assert (link.seconds(1000) or 1.0) < 1e-6


# -- prefill ----------------------------------------------------------------------------------------------------


def prefill(estimate: PrefillEstimate, fixed: float, each: float, pair: float, sizes: list[int], noise: float = 0.0,
            seed: int = 0) -> None:  # fmt: skip
    """Prompts of 8 steps each, of these sizes in turn."""
    rng, context = np.random.default_rng(seed), 0
    for step, size in enumerate(sizes):
        context = 0 if step % 8 == 0 else context
        seconds = fixed + size * (each + pair * (context + (size - 1) / 2))
        estimate.observe(size, context, seconds * float(np.exp(rng.normal(0, noise))))
        context += size


def truth(start: int, stop: int, fixed: float, each: float, pair: float, step: int) -> float:
    return fixed * -(-(stop - start) // step) + (stop - start) * (each + pair * (start + stop - 1) / 2)


def test_prefill_is_unknown_before_its_first_step_and_then_a_cost_per_token() -> None:
    estimate = PrefillEstimate()
    assert estimate.seconds(0, 100) is None
    estimate.observe(100, 0, 2.0)
    assert estimate.seconds(0, 100) == pytest.approx(2.0, rel=0.02)
    assert estimate.seconds(1000, 1050) == pytest.approx(1.0, rel=0.05)
    assert estimate.seconds(5, 5) == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("each", "context_weight"), [(1e-6, 0.0), (1e-4, 0.3), (1e-3, 3.0)])
def test_cost_that_grows_with_the_context_is_learnt(each: float, context_weight: float, seed: int) -> None:
    pair = context_weight * each / 4096
    estimate = PrefillEstimate()
    prefill(estimate, 0.0, each, pair, [512] * 24, noise=0.01, seed=seed)
    for start, stop in ((0, 512), (2048, 2560), (0, 4096), (1024, 8192)):
        assert estimate.seconds(start, stop) == pytest.approx(truth(start, stop, 0, each, pair, 512), rel=0.2)


@FACTORS
@pytest.mark.parametrize("seed", range(12))
def test_prefill_that_changes_a_hundredfold_is_followed_within_twenty_steps(factor: float, seed: int) -> None:
    estimate, each, pair = PrefillEstimate(), 1e-5, 5e-9
    rng = np.random.default_rng(seed)
    prefill(estimate, 0.0, each, pair, [512] * 40, noise=0.05, seed=seed)
    estimate.seconds(0, 512)
    prefill(estimate, 0.0, each * factor, pair * factor, rng.integers(128, 513, 20).tolist(), noise=0.05, seed=seed)
    for start, stop in ((0, 512), (0, 2048), (1024, 1536)):
        wanted = factor * truth(start, stop, 0, each, pair, 512)
        assert estimate.seconds(start, stop) == pytest.approx(wanted, rel=0.35)


@FACTORS
def test_equal_steps_are_followed_within_twenty(factor: float) -> None:
    estimate = PrefillEstimate()
    for seconds in [1.0] * 30 + [factor] * 20:
        estimate.observe(256, 1024, seconds)
        guess = estimate.seconds(1024, 1280)
    assert guess == pytest.approx(factor, rel=0.05)


def test_newer_steps_weigh_more() -> None:
    estimate = PrefillEstimate()
    for seconds in [1.0] * 8 + [2.0] * 8:
        estimate.observe(256, 1024, seconds)
    assert 1.6 < (estimate.seconds(1024, 1280) or 0.0) < 2


def test_many_short_steps_do_not_unlearn_the_long_ones() -> None:
    """Requests that find almost all of their prompt compute a token or two, at the fixed price of a step."""
    estimate, price = PrefillEstimate(), (5e-3, 1e-5, 2e-9)
    prefill(estimate, *price, [512, 200, 64, 512, 300, 8, 512, 128] * 3)
    assert estimate.seconds(0, 4096) == pytest.approx(truth(0, 4096, *price, 512), rel=0.1)
    for step in range(200):
        estimate.observe(1, 1000, price[0] + price[1] + 1000 * price[2])
        if step % 10 == 0:
            estimate.seconds(0, 10)
    assert estimate.seconds(0, 4096) == pytest.approx(truth(0, 4096, *price, 512), rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 50_000), st.floats(0, 1e3)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_whatever_was_seen_prefill_takes_no_negative_time_and_more_tokens_take_longer(
    steps: list[tuple[int, int, float]],
) -> None:
    estimate = PrefillEstimate()
    for num_tokens, context, seconds in steps:
        estimate.observe(num_tokens, context, seconds)
    times = [estimate.seconds(100, 100 + n) for n in (0, 1, 100, 5000)]
    assert all(0 <= a <= b < float("inf") for a, b in pairwise(t for t in times if t is not None))


@pytest.mark.parametrize(
    ("num_tokens", "context", "seconds"), [(0, 0, 1.0), (1, -1, 1.0), (1, 0, -1.0), (1, 0, float("nan"))]
)
def test_what_is_no_prefill_is_refused(num_tokens: int, context: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="no prefill"):
        PrefillEstimate().observe(num_tokens, context, seconds)


# -- hindsight --------------------------------------------------------------------------------------------------


def test_regret_is_what_the_better_fixed_choice_would_have_saved() -> None:
    assert regret(3.0, 5.0, 2.0) == 1.0
    assert regret(3.0, 2.5, 9.0) == 0.5
    assert regret(1.0, 2.0, 2.0) == -1.0
    assert regret(3.0, None, 2.0) == 1.0
    assert regret(3.0, None, None) is None
    assert Hindsight(3.0, 5.0, 2.0).regret == 1.0
