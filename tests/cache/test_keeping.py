"""Promises of holds, withdrawal, idle time, deadlines of loaded blocks and quotas on the device."""

import numpy as np
import pytest

from kvwise.cache.events import BlocksStored
from kvwise.cache.misses import RemovalReason
from kvwise.cache.terms import Terms
from kvwise.core.errors import InvariantError, UsageError

PROMPT = list(range(13))
PURGED = RemovalReason.PURGED


def keys_of(cache, tokens=PROMPT, salt=""):
    return cache.keys(np.array(tokens), salt)


# holds


def test_held_blocks_outlive_their_row_and_are_free_when_both_are_gone(cache):
    row = cache.start(PROMPT)
    blocks = cache.hold(row, 1, 3)
    assert blocks.tolist() == cache.blocks(row)[1:3]
    assert cache.usage().num_held == 2
    cache.release(row)
    cache.check()
    assert cache.usage().num_free == 8
    assert cache.num_available == 8
    other = cache.start([70])
    assert not cache.reserve(other, 4 * 9)
    cache.let_go(blocks)
    cache.check()
    assert cache.usage().num_free == 9


def test_a_hold_that_ends_first_leaves_the_row_as_it_was(cache):
    row = cache.prefill(PROMPT)
    before = cache.usage()
    cache.let_go(cache.hold(row, 0, 4))
    assert cache.usage() == before
    cache.check()


def test_held_published_blocks_are_no_victims_and_stay_findable(cache):
    row = cache.prefill(PROMPT)
    blocks = cache.hold(row, 0, 2)
    cache.release(row)
    assert cache.num_available == 8
    assert cache.reserve(cache.start([70]), 4 * 8)
    assert cache.found(PROMPT) == 8
    cache.let_go(blocks)
    cache.check()
    assert cache.usage().num_cached == 2


def test_a_held_block_that_expires_is_free_only_after_the_transfer(cache, clock):
    row = cache.prefill(PROMPT, terms=Terms(expires_at=5.0))
    blocks = cache.hold(row, 0, 3)
    cache.release(row)
    clock.advance(5.0)
    assert cache.expire() == 3
    assert cache.found(PROMPT) == 0
    assert cache.usage().num_free == 7
    cache.let_go(blocks)
    assert cache.usage().num_free == 10
    cache.check()


def test_a_hold_is_let_go_exactly_once(cache):
    row = cache.prefill(PROMPT)
    blocks = cache.hold(row, 0, 2)
    cache.hold(row, 1, 2)
    cache.let_go(blocks)
    with pytest.raises(InvariantError, match="exactly once"):
        cache.let_go(blocks)
    with pytest.raises(InvariantError, match="exactly once"):
        cache.let_go(np.array([blocks[1], blocks[1]]))
    cache.let_go(blocks[1:])
    cache.check()


def test_a_row_is_not_rewritten_in_place_while_a_transfer_reads_it(make_cache):
    cache = make_cache(sharing=False)
    row = cache.prefill(PROMPT)
    blocks = cache.hold(row, 0, 2)
    cache.paginate(row, np.full((2, 2), 4))
    cache.finish_paginate(row)
    pages, _ = cache.page_table(row)
    assert not set((pages.reshape(-1) // 4).tolist()) & set(blocks.tolist())
    cache.release(row)
    cache.let_go(blocks)
    assert cache.usage().num_free == 10


def test_holds_beyond_the_row_or_on_pages_are_refused(cache):
    row = cache.prefill(PROMPT)
    with pytest.raises(UsageError, match="reserve before hold"):
        cache.hold(row, 2, 5)
    cache.paginate(row, np.ones((2, 2), int))
    with pytest.raises(UsageError, match="holds pages"):
        cache.hold(row, 0, 1)
    cache.release(row)
    with pytest.raises(InvariantError):
        cache.hold(row, 0, 0)


# withdrawal


def test_withdrawn_blocks_come_back_held_so_that_they_can_be_overwritten(cache):
    cache.release(cache.prefill(PROMPT))
    withdrawn = cache.withdraw(keys_of(cache).chain, PURGED)
    assert (sorted(withdrawn.blocks.tolist()), withdrawn.kept) == ([0, 1, 2], 0)
    assert cache.found(PROMPT) == 0
    assert cache.why(PROMPT) == "purged"
    assert cache.usage().num_free == 7
    cache.check()
    cache.let_go(withdrawn.blocks)
    assert cache.usage().num_free == 10
    cache.check()


def test_what_a_running_request_holds_is_kept_private_and_freed_at_its_end(cache):
    row = cache.prefill(PROMPT)
    other = cache.prefill([*PROMPT[:8], 50, 51, 52, 53, 54])
    cache.release(other)
    keys = keys_of(cache, [*PROMPT[:8], 50, 51, 52, 53, 54]).chain
    withdrawn = cache.withdraw([*keys, *keys, b"x" * 32], PURGED)
    assert (len(withdrawn.blocks), withdrawn.kept) == (1, 2)
    assert cache.found(PROMPT) == 0
    cache.let_go(withdrawn.blocks)
    cache.release(row)
    cache.check()
    assert cache.usage().num_free == 9, "the third block of the first prompt was not named"


def test_a_pinned_block_can_be_withdrawn(cache):
    cache.release(cache.prefill(PROMPT))
    cache.pin(keys_of(cache))
    cache.let_go(cache.withdraw(keys_of(cache).chain, PURGED).blocks)
    assert (cache.usage().num_pinned, cache.usage().num_free) == (0, 10)
    cache.check()


def test_withdrawing_what_a_transfer_reads_frees_it_after_both(cache):
    row = cache.prefill(PROMPT)
    blocks = cache.hold(row, 0, 1)
    cache.release(row)
    withdrawn = cache.withdraw(keys_of(cache).chain, PURGED)
    assert (len(withdrawn.blocks), withdrawn.kept) == (2, 1)
    cache.let_go(withdrawn.blocks)
    cache.check()
    cache.let_go(blocks)
    assert cache.usage().num_free == 10


# deadlines


def test_idle_time_slides_with_each_new_hit_but_not_beyond_the_end(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=12.0, idle_s=5.0)))
    for _ in range(2):
        clock.advance(4.0)
        cache.release(cache.prefill(PROMPT))
    clock.advance(np.nextafter(12.0, 0) - clock.now())
    assert cache.found(PROMPT) == 12
    clock.advance(12.0 - clock.now())
    assert cache.found(PROMPT) == 0
    assert cache.expire() == 3
    cache.check()


def test_without_a_hit_idle_blocks_expire_one_tick_after(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(idle_s=5.0)))
    clock.advance(np.nextafter(5.0, 0))
    assert cache.found(PROMPT) == 12
    clock.advance(5.0 - clock.now())
    assert cache.found(PROMPT) == 0
    assert cache.why(PROMPT) == "expired"


def test_only_the_blocks_that_are_hit_slide(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(idle_s=5.0)))
    clock.advance(4.0)
    cache.release(cache.prefill(PROMPT[:9]))
    clock.advance(1.0)
    assert cache.expire() == 1
    assert cache.found(PROMPT) == 8
    cache.check()


def test_the_first_writers_terms_hold(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=5.0)))
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=50.0)))
    clock.advance(5.0)
    assert cache.found(PROMPT) == 0


def test_loaded_blocks_keep_the_rest_of_their_time(cache, clock):
    row = cache.start(PROMPT, terms=Terms(expires_at=20.0))
    cache.set_expiry(row, 1, np.array([6.0, 99.0]))
    cache.set_expiry(row, 1, np.array([8.0]))
    cache.compute(row, 13)
    clock.advance(6.0)
    assert cache.found(PROMPT) == 4
    assert cache.expire() == 1
    clock.advance(14.0)
    assert cache.expire() == 2
    cache.check()


def test_limits_do_not_pass_to_the_next_sequence_in_the_row(cache, clock):
    row = cache.start(PROMPT)
    cache.set_expiry(row, 0, np.array([1.0]))
    cache.release(row)
    assert cache.prefill(PROMPT) == row
    clock.advance(2.0)
    assert cache.found(PROMPT) == 12


def test_a_fork_keeps_the_limits(cache, clock):
    row = cache.start([0])
    assert cache.reserve(row, 4)
    cache.compute(row, 4)
    cache.set_expiry(row, 0, np.array([3.0]))
    twin, _ = cache.fork(row)
    cache.release(row)
    cache.extend_keys(twin, np.array([0, 1, 2, 3]))
    cache.compute(twin, 4)
    clock.advance(3.0)
    assert cache.found([0, 1, 2, 3, 4]) == 0


@pytest.mark.parametrize("terms", [{"idle_s": 0.0}, {"idle_s": -1.0}, {"idle_s": np.nan}, {"expires_at": np.nan}])
def test_terms_that_make_no_sense_are_refused(terms):
    with pytest.raises(UsageError, match="leave it out"):
        Terms(**terms)


# what is there


def test_what_is_stored_is_listed_with_its_terms(cache, clock):
    terms = Terms(5.0, 4.0, "t", "s")
    cache.release(cache.prefill(PROMPT, salt="t", terms=terms))
    row = cache.prefill([70, 71, 72, 73, 74])
    keys = keys_of(cache, salt="t")
    assert [key for key, of in cache.stored() if of == terms] == keys.chain
    assert [of for key, of in cache.stored() if key not in keys.chain] == [Terms()]
    assert (cache.num_resident(keys), cache.is_stored(keys.chain[2])) == (3, True)
    clock.advance(5.0)
    assert (cache.num_resident(keys), cache.is_stored(keys.chain[2])) == (0, True)
    cache.expire()
    assert not cache.is_stored(keys.chain[2])
    cache.release(row)


# who publishes


def test_a_private_prompt_neither_hits_nor_publishes(cache):
    cache.release(cache.prefill(PROMPT))
    row = cache.prefill(PROMPT, salt=None)
    assert cache.num_computed[row] == 13
    assert cache.blocks(row)[0] not in (0, 1, 2)
    assert cache.why(PROMPT, salt=None) == "sharing off"
    rows = np.array([row])
    assert cache.reserve(row, 17)
    assert len(cache.keyless(rows, np.array([17]))) == 0
    cache.drain_events()
    cache.compute(row, 17)
    assert cache.drain_events() == []
    cache.check()


def test_a_row_kept_private_publishes_nothing_more_and_nobody_waits(cache):
    row = cache.start(PROMPT)
    cache.compute(row, 5)
    cache.keep_private(row)
    assert cache.match(keys_of(cache), 13).num_pending == 0
    cache.compute(row, 13)
    assert cache.found(PROMPT) == 4
    cache.check()


def test_other_model_is_said_of_prompts_that_lower_tiers_keep_under_one(cache):
    cache.note_foreign([keys_of(cache).bare_probe])
    assert cache.why(PROMPT) == "other model or dtype"
    assert cache.why([9, *PROMPT]) == "never stored"
    cache.prefill(PROMPT, salt="a")
    assert cache.why(PROMPT, salt="b") == "other salt"


# quotas


def start_of(cache, first, num_blocks, tenant):
    """Publish and release a prompt of whole blocks and one token, of its own tokens."""
    tokens = list(range(first, first + 4 * num_blocks + 1))
    cache.release(cache.prefill(tokens, salt=tenant, terms=Terms(tenant=tenant)))
    cache.check()
    return tokens


def test_a_tenant_over_its_quota_loses_its_own_oldest_idle_blocks(make_cache):
    cache = make_cache(quotas={"t": 3})
    other = start_of(cache, 0, 3, "u")
    first = start_of(cache, 100, 2, "t")
    second = start_of(cache, 200, 1, "t")
    third = start_of(cache, 300, 1, "t")
    assert cache.tenant_blocks("t") == 3
    assert cache.num_evicted == 1
    assert [cache.found(text, salt="t") for text in (first, second, third)] == [4, 4, 4]
    assert cache.found(other, salt="u") == 12
    assert cache.why(first, salt="t") == "evicted"


def test_blocks_that_no_idle_one_makes_room_for_stay_private(make_cache):
    cache = make_cache(quotas={"t": 2})
    row = cache.prefill(PROMPT, salt="t", terms=Terms(tenant="t"))
    assert cache.found(PROMPT, salt="t") == 8
    cache.check()
    (stored,) = cache.drain_events()
    assert isinstance(stored, BlocksStored)
    assert len(stored.keys) == 2
    cache.release(row)
    assert (cache.usage().num_cached, cache.usage().num_free) == (2, 8)
    cache.check()


def test_pinned_and_held_blocks_of_a_tenant_are_not_pushed_out(make_cache):
    cache = make_cache(quotas={"t": 2})
    first = start_of(cache, 100, 2, "t")
    cache.pin(keys_of(cache, first, "t"))
    second = start_of(cache, 200, 1, "t")
    assert [cache.found(text, salt="t") for text in (first, second)] == [8, 0]
    cache.unpin(keys_of(cache, first, "t"))
    start_of(cache, 200, 1, "t")
    assert [cache.found(text, salt="t") for text in (first, second)] == [4, 4]


def test_a_duplicate_does_not_come_back_for_the_idle_block_that_left_for_it(make_cache):
    cache = make_cache(num_blocks=12, quotas={"t": 3})
    row, twin = (cache.start(list(range(17)), "t", Terms(tenant="t")) for _ in range(2))
    cache.compute(row, 17)
    cache.release(row)
    cache.compute(twin, 17)
    cache.check()
    assert cache.tenant_blocks("t") == 3


def test_a_pinned_block_of_a_limited_tenant_may_still_be_cleared(make_cache):
    cache = make_cache(quotas={"t": 2})
    first = start_of(cache, 100, 2, "t")
    cache.pin(keys_of(cache, first, "t"))
    assert cache.clear() == 2
    assert (cache.tenant_blocks("t"), cache.usage().num_free) == (0, 10)
    cache.check()


def test_a_hit_makes_a_block_the_tenants_latest(make_cache):
    cache = make_cache(quotas={"t": 2})
    first, second = start_of(cache, 100, 1, "t"), start_of(cache, 200, 1, "t")
    cache.release(cache.prefill(first, salt="t", terms=Terms(tenant="t")))
    start_of(cache, 300, 1, "t")
    assert [cache.found(text, salt="t") for text in (first, second)] == [4, 0]


def test_a_key_that_is_stored_already_takes_no_quota(make_cache):
    cache = make_cache(quotas={"t": 1})
    first = start_of(cache, 100, 1, "t")
    row, twin = (cache.start([7, 8, 9, 10, 11], "t", Terms(tenant="t")) for _ in range(2))
    cache.commit(np.array([row, twin]), np.array([5, 5]))
    cache.check()
    assert cache.tenant_blocks("t") == 1
    assert [cache.found(text, salt="t") for text in (first, [7, 8, 9, 10, 11])] == [0, 4]
