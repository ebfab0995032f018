"""Promises of rows: room, commit, release, fork."""

import numpy as np
import pytest

from kvwise.core.errors import CapacityError, InvariantError, UsageError


def test_reserve_many_is_all_or_nothing_per_row_in_order(cache):
    rows = np.array([cache.start([70 + i]) for i in range(3)])
    granted = cache.reserve_many(rows, np.array([16, 40, 12]))
    assert granted.tolist() == [True, False, True]
    assert cache.num_blocks[rows].tolist() == [4, 1, 3]
    assert cache.usage().num_free == 2
    cache.check()


def test_reserve_many_gives_each_row_its_own_blocks(make_cache):
    cache = make_cache(num_blocks=64)
    rows = np.array([cache.start([70 + i]) for i in range(4)])
    assert cache.reserve_many(rows, np.array([4, 17, 5, 40])).all()
    assert cache.num_blocks[rows].tolist() == [1, 5, 2, 10]
    held = [block for row in rows for block in cache.blocks(row)]
    assert len(set(held)) == len(held)
    cache.check()


def test_room_already_there_costs_nothing(cache):
    row = cache.start([1, 2])
    assert cache.reserve(row, 4)
    assert cache.usage().num_free == 9


def test_commit_beyond_the_reserved_room_is_refused(cache):
    row = cache.start([1, 2])
    with pytest.raises(InvariantError, match="5 tokens"):
        cache.compute(row, 5)


def test_commit_never_takes_tokens_back(cache):
    row = cache.prefill([1, 2, 3])
    with pytest.raises(InvariantError, match="never take tokens back"):
        cache.compute(row, 2)


def test_a_released_row_is_refused_everywhere(cache):
    row = cache.prefill([1, 2, 3])
    cache.release(row)
    one = np.array([row])
    for call in (
        lambda: cache.release(row),
        lambda: cache.fork(row),
        lambda: cache.reserve(row, 9),
        lambda: cache.commit(one, np.array([3])),
        lambda: cache.extend_keys(row, np.arange(4)),
        lambda: cache.paginate(row, np.ones((2, 2), int)),
    ):
        with pytest.raises(InvariantError):
            call()
    cache.check()


def test_release_returns_everything_that_is_not_shared(cache):
    row = cache.prefill(list(range(13)))
    cache.release(row)
    usage = cache.usage()
    assert (usage.num_free, usage.num_cached, usage.num_referenced) == (7, 3, 0)
    assert cache.num_available == 10


def test_rows_run_out_with_a_clear_error(make_cache):
    cache = make_cache(max_sequences=1)
    cache.start([1])
    with pytest.raises(CapacityError, match="all 1 sequence rows"):
        cache.start([2])
    cache.check()


def test_a_request_larger_than_the_pool_is_refused_by_its_size(cache):
    cache.require_fits(40)
    with pytest.raises(CapacityError, match=r"41 tokens need 11 blocks.*at most 10"):
        cache.require_fits(41)


def test_a_table_that_is_too_short_is_an_error_not_a_corruption(cache):
    row = cache.start([1])
    with pytest.raises(CapacityError, match="11 blocks"):
        cache.reserve(row, 41)
    cache.check()


def test_fork_shares_full_blocks_and_copies_the_partial_one(cache):
    row = cache.prefill(list(range(10)))
    assert cache.reserve(row, 16)
    twin, moves = cache.fork(row)
    assert cache.blocks(twin)[:2] == cache.blocks(row)[:2]
    assert [tuple(move) for move in moves] == [(cache.blocks(row)[2], cache.blocks(twin)[2])]
    assert cache.num_blocks[twin] == 3
    assert cache.num_computed[twin] == 10
    cache.check()
    cache.release(row)
    cache.check()
    cache.release(twin)
    assert cache.num_available == 10


def test_fork_at_a_block_boundary_moves_nothing(cache):
    twin, moves = cache.fork(cache.prefill(list(range(8))))
    assert moves == []
    assert cache.num_blocks[twin] == 2


def test_forks_publish_what_they_generate_on_their_own(cache):
    row = cache.prefill(list(range(7)))
    twin, _ = cache.fork(row)
    for who, token in ((row, 7), (twin, 77)):
        assert cache.reserve(who, 8)
        cache.extend_keys(who, np.array([4, 5, 6, token]))
        cache.compute(who, 8)
    assert cache.found([0, 1, 2, 3, 4, 5, 6, 7, 0]) == 8
    assert cache.found([0, 1, 2, 3, 4, 5, 6, 77, 0]) == 8
    cache.check()


def test_forks_that_share_an_unkeyed_block_publish_it_once(cache):
    row = cache.start([0])
    assert cache.reserve(row, 4)
    cache.compute(row, 4)
    twin, _ = cache.fork(row)
    for who in (row, twin):
        cache.extend_keys(who, np.array([0, 1, 2, 3]))
        cache.compute(who, 4)
    cache.check()
    assert cache.found([0, 1, 2, 3, 4]) == 4


def test_a_fork_without_room_changes_nothing(cache):
    row = cache.start(list(range(38)))
    cache.compute(row, 38)
    before = cache.usage()
    with pytest.raises(CapacityError, match="no block is free"):
        cache.fork(row)
    assert cache.usage() == before


def test_a_sequence_with_pages_cannot_be_forked(cache):
    row = cache.prefill([1, 2, 3])
    cache.paginate(row, np.ones((2, 2), int))
    with pytest.raises(UsageError, match="fork before paginate"):
        cache.fork(row)


@pytest.mark.parametrize("options", [{"num_blocks": 0}, {"max_sequences": 0}])
def test_sizes_below_one_are_refused(make_cache, options):
    with pytest.raises(UsageError, match="each must be >= 1"):
        make_cache(**options)
