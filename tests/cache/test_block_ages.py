"""Ages of published blocks: lifetime, idle time before eviction, gap between uses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvwise.cache.ages import AGE_BOUNDS_S, AgeHistogram
from kvwise.cache.manager import CacheManager
from kvwise.cache.misses import RemovalReason
from kvwise.cache.terms import Terms
from kvwise.core.clock import VirtualClock


def seen(histogram: AgeHistogram) -> dict[float, int]:
    """Upper bound -> observations, of those there are."""
    bounds = [*AGE_BOUNDS_S, np.inf]
    return {bound: count for bound, count in zip(bounds, histogram.counts, strict=True) if count}


def test_nothing_is_observed_before_a_block_leaves_or_is_hit(cache: Any, clock: VirtualClock) -> None:
    row = cache.prefill(range(12))
    clock.advance(5)
    cache.release(row)
    assert cache.block_ages() == (AgeHistogram(), AgeHistogram(), AgeHistogram())


def test_a_hit_tells_the_gap_since_the_last_use(cache: Any, clock: VirtualClock) -> None:
    row = cache.prefill(range(9))
    clock.advance(0.3)
    again = cache.prefill(range(9))  # hit 0.3 s after publication, while the first still runs
    clock.advance(4)
    cache.release(row)
    cache.release(again)
    clock.advance(7)
    cache.prefill(range(9))  # 7 s after it was let go, not 11 s after it was hit
    gap = cache.block_ages().reuse_gap
    assert seen(gap) == {0.5: 2, 10.0: 2}
    assert gap.total_s == pytest.approx(2 * (0.3 + 7))


def test_eviction_tells_lifetime_and_idle_time(cache: Any, clock: VirtualClock) -> None:
    row = cache.prefill(range(40))  # the whole pool of 10 blocks
    clock.advance(50)
    cache.release(row)
    clock.advance(15)
    cache.start(range(100, 112))  # takes 3 of them
    ages = cache.block_ages()
    assert seen(ages.lifetime) == {120.0: 3}
    assert ages.lifetime.total_s == pytest.approx(3 * 65)
    assert seen(ages.idle_before_evict) == {20.0: 3}
    assert ages.idle_before_evict.total_s == pytest.approx(3 * 15)


def test_expiry_and_purge_end_a_life_but_are_no_eviction(cache: Any, clock: VirtualClock) -> None:
    row = cache.prefill(range(8), terms=Terms(expires_at=3.0))
    cache.release(row)
    clock.advance(3)
    assert cache.expire()
    row = cache.prefill(range(50, 58))
    clock.advance(0.4)
    cache.withdraw(cache.keys(np.arange(50, 58)).chain, RemovalReason.PURGED)
    ages = cache.block_ages()
    assert seen(ages.lifetime) == {5.0: 2, 0.5: 2}
    assert seen(ages.idle_before_evict) == {}


def test_a_transfer_is_no_use(cache: Any, clock: VirtualClock) -> None:
    """What a tier copies has not been used by anybody."""
    row = cache.prefill(range(8))
    held = cache.hold(row, 0, 2)
    cache.release(row)
    clock.advance(9)
    cache.let_go(held)
    cache.prefill(range(8))
    assert seen(cache.block_ages().reuse_gap) == {10.0: 1}  # the second block is computed anew: one token must be


def test_every_observation_is_counted_once(make_cache: Callable[..., CacheManager], clock: VirtualClock) -> None:
    """Against a plain list: 200 random prompts over few prefixes in a small pool."""
    cache: Any = make_cache(num_blocks=30)
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        prompt = np.concatenate([np.full(8, rng.integers(4)), rng.integers(9, 500, 5)])
        hits += cache.found(prompt) // 4
        row = cache.prefill(prompt)
        clock.advance(float(rng.exponential(0.2)))
        cache.release(row)
        cache.check()
    ages, left = cache.block_ages(), len(list(cache.stored()))
    removed = sum(len(event.keys) for event in cache.drain_events() if hasattr(event, "reason"))
    assert sum(ages.reuse_gap.counts) == hits > 50
    assert sum(ages.lifetime.counts) == removed == cache.num_evicted > 50
    assert sum(ages.idle_before_evict.counts) == cache.num_evicted
    assert left <= 30
    assert ages.idle_before_evict.total_s < ages.lifetime.total_s


def test_bounds_are_inclusive_as_prometheus_wants() -> None:
    from kvwise.cache.ages import BlockAges

    ages = BlockAges(3)
    ages.publish(np.array([0, 1, 2]), 0.0)
    ages.leave(np.array([0, 1, 2]), 1800.0, evicted=False)
    ages.publish(np.array([0]), 0.0)
    ages.leave(np.array([0]), 1800.5, evicted=False)
    assert seen(ages.figures().lifetime) == {1800.0: 3, np.inf: 1}
