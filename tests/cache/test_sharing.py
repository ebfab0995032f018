"""Promises of prefix sharing: what is found, when, and why not."""

import numpy as np
import pytest

from kvwise.cache.events import AllBlocksCleared, BlocksRemoved, BlocksStored
from kvwise.cache.terms import Terms
from kvwise.core.errors import InvariantError, UsageError

PROMPT = list(range(13))


def test_a_block_is_found_only_after_the_commit_that_fills_it(cache):
    row = cache.start(PROMPT)
    assert cache.found(PROMPT) == 0
    cache.compute(row, 7)
    assert cache.found(PROMPT) == 4
    cache.compute(row, 13)
    assert cache.found(PROMPT) == 12


def test_one_token_is_always_left_to_compute(cache):
    cache.prefill(PROMPT)
    assert cache.found(PROMPT[:12]) == 8
    assert cache.found(PROMPT[:1]) == 0


def test_a_hit_shares_the_very_blocks(cache):
    first = cache.prefill(PROMPT)
    second = cache.start(PROMPT)
    assert cache.blocks(second)[:3] == cache.blocks(first)[:3]
    assert cache.blocks(second)[3] != cache.blocks(first)[3]
    assert cache.num_computed[second] == 12
    assert (cache.num_prefix_hits, cache.num_prefix_queries) == (12, 26)


def test_many_requests_with_one_prefix_hold_it_once(make_cache):
    cache = make_cache(num_blocks=40, max_sequences=32)
    for _ in range(32):
        cache.prefill(PROMPT)
    assert cache.usage().num_referenced == 3 + 32
    cache.check()


def test_what_a_running_sequence_will_publish_is_pending_until_it_does(cache):
    row = cache.start(PROMPT)
    match = cache.match(cache.keys(np.array(PROMPT)), len(PROMPT))
    assert (match.num_tokens, match.num_pending, match.miss.reason) == (0, 12, "being computed")
    cache.compute(row, 8)
    assert cache.match(cache.keys(np.array(PROMPT)), len(PROMPT)).num_pending == 4
    cache.release(row)
    assert cache.match(cache.keys(np.array(PROMPT)), len(PROMPT)).num_pending == 0
    cache.check()


def test_the_first_writer_wins_and_a_duplicate_stays_private(cache):
    first, second = cache.start(PROMPT), cache.start(PROMPT)
    cache.compute(second, 13)
    cache.compute(first, 13)
    assert cache.match(cache.keys(np.array(PROMPT)), 13).blocks.tolist() == cache.blocks(second)[:3]
    cache.release(first)
    assert cache.usage().num_cached == 0
    cache.release(second)
    assert cache.usage().num_cached == 3
    cache.check()


def test_without_sharing_nothing_is_indexed(make_cache):
    cache = make_cache(sharing=False)
    cache.release(cache.prefill(PROMPT))
    assert cache.found(PROMPT) == 0
    assert cache.why(PROMPT) == "sharing off"
    assert cache.usage().num_free == 10
    assert cache.drain_events() == []
    rows = np.array([cache.start(PROMPT)])
    assert len(cache.keyless(rows, np.array([13]))) == 0


def test_generated_blocks_become_matchable_once_their_keys_are_known(cache):
    row = cache.prefill(PROMPT)
    rows, total = np.array([row]), np.array([16])
    assert cache.reserve(row, 16)
    assert len(cache.keyless(rows, np.array([15]))) == 0
    assert cache.keyless(rows, total).tolist() == [0]
    cache.commit(rows, total)
    assert cache.found(list(range(17))) == 12, "without a key the block stays private"
    assert cache.num_keyed(row) == 12
    cache.extend_keys(row, np.array([12, 13, 14, 15]))
    assert cache.reserve(row, 17)
    cache.commit(rows, np.array([17]))
    assert cache.found(list(range(17))) == 16


def test_a_hit_block_is_never_evicted_and_a_failed_reserve_changes_nothing(cache):
    cache.release(cache.prefill(PROMPT))
    holder = cache.start(PROMPT)
    other = cache.start([70])
    before = cache.usage()
    assert not cache.reserve(other, 4 * 7)
    assert cache.usage() == before
    assert cache.reserve(other, 4 * 6)
    assert cache.blocks(holder)[:3] == [0, 1, 2]
    cache.check()


def test_admitting_a_match_that_has_been_evicted_is_refused(cache):
    cache.release(cache.prefill(PROMPT))
    keys = cache.keys(np.array(PROMPT))
    match = cache.match(keys, 13)
    other = cache.start([70])
    assert cache.reserve(other, 40)
    with pytest.raises(InvariantError, match="match again"):
        cache.admit(match, keys, 13)


def test_salts_never_share(cache):
    cache.prefill(PROMPT, salt="a")
    assert cache.found(PROMPT, salt="a") == 12
    assert cache.found(PROMPT, salt="b") == 0
    assert cache.found(PROMPT) == 0


def test_every_miss_has_its_reason(cache, clock):
    assert cache.why(PROMPT) == "never stored"
    row = cache.prefill(PROMPT, terms=Terms(expires_at=5.0))
    assert cache.why(PROMPT) == "block boundary"
    assert cache.why(PROMPT, salt="b") == "other salt"
    cache.release(row)
    clock.advance(6.0)
    assert cache.why(PROMPT) == "expired"
    cache.expire()
    assert cache.why(PROMPT) == "expired"
    cache.release(cache.prefill(PROMPT))
    clock.advance(1.0)
    greedy = cache.start([70])
    assert cache.reserve(greedy, 40)
    miss = cache.match(cache.keys(np.array(PROMPT)), 13).miss
    assert str(miss) == "block 0: evicted by lru at 7.000 s"
    cache.release(greedy)
    cache.prefill(PROMPT)
    cache.clear()
    assert cache.why(PROMPT) == "cleared"


def test_misses_are_counted_by_reason(cache):
    cache.prefill(PROMPT)
    cache.prefill(PROMPT)
    assert {reason.value: count for reason, count in cache.miss_counts.items()} == {
        "never stored": 1,
        "block boundary": 1,
    }


def test_a_departed_first_block_is_not_reported_under_another_salt(cache):
    cache.release(cache.prefill(PROMPT, salt="a"))
    cache.clear()
    assert cache.why(PROMPT, salt="b") == "never stored"


def test_events_tell_the_chain_and_the_removal(cache):
    row = cache.prefill(PROMPT)
    keys = cache.keys(np.array(PROMPT))
    (stored,) = cache.drain_events()
    assert stored == BlocksStored(0.0, tuple(keys.chain), (keys.root, *keys.chain[:2]), (0, 1, 2))
    cache.release(row)
    cache.clear()
    removed, cleared = cache.drain_events()
    assert isinstance(removed, BlocksRemoved)
    assert removed.reason == "cleared"
    assert set(removed.keys) == set(keys.chain)
    assert cleared == AllBlocksCleared(0.0)


def test_a_full_event_log_counts_what_it_loses(make_cache):
    cache = make_cache(max_event_blocks=2)
    for _ in range(3):
        cache.clear()
    assert len(cache.drain_events()) == 2
    assert cache.num_lost_events == 1


def test_an_event_log_is_bounded_by_the_blocks_that_it_names(make_cache):
    cache = make_cache(max_event_blocks=4)
    for salt in ("a", "b", "c"):
        cache.release(cache.prefill(PROMPT, salt=salt))
    stored = cache.drain_events()
    assert [len(event.keys) for event in stored] == [3]
    assert cache.num_lost_events == 2
    cache.release(cache.prefill(PROMPT[:4], salt="d"))
    assert [len(event.keys) for event in cache.drain_events()] == [1]
    assert cache.num_lost_events == 2


def test_rows_with_and_without_keys_can_be_committed_together(cache):
    keyed, keyless = cache.start(PROMPT[:8]), cache.start([70, 71, 72])
    assert cache.reserve(keyless, 4)
    cache.commit(np.array([keyless, keyed]), np.array([4, 8]))
    assert cache.match(cache.keys(np.array(PROMPT)), 13).blocks.tolist() == cache.blocks(keyed)
    assert cache.found([70, 71, 72, 73, 74]) == 0
    cache.check()


def test_the_first_to_announce_is_the_one_to_wait_for(cache):
    first, second = cache.start(PROMPT), cache.start(PROMPT)
    cache.release(second)
    assert cache.why(PROMPT) == "being computed"
    cache.release(first)
    assert cache.why(PROMPT) == "never stored"
    cache.check()


@pytest.mark.parametrize(("num_last", "hit"), [(1, 12), (2, 8), (5, 8), (6, 4), (9, 4), (10, 0), (13, 0), (99, 0)])
def test_a_match_can_leave_more_than_one_token_to_compute(cache, num_last, hit):
    prompt = np.arange(13)
    cache.prefill(prompt)
    keys = cache.keys(prompt)
    match = cache.match(keys, 13, num_last)
    assert match.num_tokens == hit == 4 * len(match.blocks)
    assert hit == 0 or 13 - hit >= num_last
    assert match.miss.reason.value == "block boundary" and match.num_pending == 0
    row = cache.admit(match, keys, 13)
    assert cache.reserve(row, 13)
    cache.compute(row, 13)
    cache.check()


def test_what_ends_a_limited_run_earlier_is_still_named(cache):
    prompt = np.arange(13)
    cache.prefill(prompt[:6])
    assert cache.match(cache.keys(prompt), 13, 5).miss.reason.value == "never stored"
    assert cache.match(cache.keys(prompt), 13, 9).miss.reason.value == "block boundary"


def test_a_match_that_leaves_nothing_to_compute_is_refused(cache):
    with pytest.raises(UsageError, match="num_last is 0"):
        cache.match(cache.keys(np.arange(4)), 4, 0)
