"""Promises of expiry and pins, on a clock that only the test moves."""

import numpy as np

from kvwise.cache.terms import Terms

PROMPT = list(range(13))


def test_expired_blocks_are_not_found_even_before_the_sweep(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=10.0)))
    clock.advance(9.9)
    assert cache.found(PROMPT) == 12
    clock.advance(0.1)
    assert cache.found(PROMPT) == 0
    assert cache.expire() == 3
    assert cache.usage().num_free == 10
    cache.check()


def test_a_hit_does_not_prolong_the_expiry(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=10.0)))
    clock.advance(9.0)
    row = cache.prefill(PROMPT)
    clock.advance(2.0)
    assert cache.expire() == 3
    assert cache.found(PROMPT) == 0
    cache.check()
    cache.release(row)
    assert cache.usage().num_free == 10, "in use when it expired: private, then free"
    cache.check()


def test_a_key_can_be_published_again_after_its_block_expired(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=1.0)))
    clock.advance(2.0)
    cache.prefill(PROMPT)
    assert cache.found(PROMPT) == 12
    cache.check()


def test_pinned_blocks_are_not_evicted(cache):
    cache.release(cache.prefill(PROMPT))
    assert cache.pin(cache.keys(np.array(PROMPT))) == 3
    other = cache.start([70])
    assert not cache.reserve(other, 4 * 8)
    assert cache.reserve(other, 4 * 7)
    assert cache.found(PROMPT) == 12
    assert cache.usage().num_pinned == 3
    cache.check()


def test_an_unpinned_block_can_be_evicted_again(cache):
    cache.release(cache.prefill(PROMPT))
    keys = cache.keys(np.array(PROMPT))
    cache.pin(keys)
    assert cache.unpin(keys) == 3
    assert cache.unpin(keys) == 0
    assert cache.reserve(cache.start([70]), 40)
    cache.check()


def test_a_pin_ends_at_its_deadline_and_the_later_deadline_holds(cache, clock):
    cache.release(cache.prefill(PROMPT))
    keys = cache.keys(np.array(PROMPT))
    cache.pin(keys, until=5.0)
    cache.pin(keys, until=3.0)
    clock.advance(4.0)
    cache.expire()
    assert cache.usage().num_pinned == 3
    clock.advance(1.0)
    assert cache.expire() == 0
    assert cache.usage().num_pinned == 0
    assert cache.num_available == 10
    cache.check()


def test_a_pin_on_a_block_in_use_outlives_the_sequence(cache):
    row = cache.prefill(PROMPT)
    cache.pin(cache.keys(np.array(PROMPT)))
    cache.release(row)
    assert cache.num_available == 7
    again = cache.prefill(PROMPT)
    cache.check()
    cache.release(again)
    cache.check()


def test_expiry_ends_a_pin(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=1.0)))
    cache.pin(cache.keys(np.array(PROMPT)))
    clock.advance(1.0)
    assert cache.expire() == 3
    assert cache.usage().num_pinned == 0
    cache.check()


def test_room_is_made_from_expired_blocks_before_good_ones_are_evicted(cache, clock):
    cache.release(cache.prefill(PROMPT))
    cache.release(cache.prefill([70, 71, 72, 73, 74], terms=Terms(expires_at=1.0)))
    clock.advance(2.0)
    row = cache.start([80])
    assert cache.reserve(row, 4 * 7)
    assert cache.num_evicted == 0
    assert cache.found(PROMPT) == 12
    cache.check()


def test_clear_leaves_live_sequences_alone(cache):
    row = cache.prefill(PROMPT)
    held = cache.blocks(row)
    assert cache.clear() == 3
    assert cache.blocks(row) == held
    assert cache.found(PROMPT) == 0
    cache.check()
    cache.release(row)
    assert cache.usage().num_free == 10
