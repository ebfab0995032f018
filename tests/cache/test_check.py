"""`check` must notice: each test breaks one promise from inside and sees it named."""

import numpy as np
import pytest

from kvwise.core.errors import InvariantError

PROMPT = list(range(13))


@pytest.fixture
def busy(make_cache):
    """One referenced row, three idle blocks, one row with pages and packed ones, one announced key."""
    cache = make_cache(packed_per_block=6)
    cache.release(cache.prefill(PROMPT))
    cache.prefill([70, 71, 72])
    row = cache.prefill([80, 81])
    cache.paginate(row, np.array([[1, 1], [1, 0]]))
    cache.finish_paginate(row)
    cache.grow_packed(row, np.array([[2, 1], [1, 0]]))
    cache.start([90, 91, 92, 93, 94])
    cache.check()
    return cache


def leak(cache):
    cache._pool.pop(1)


def free_twice(cache):
    cache._pool.push(np.array([0]))


def extra_reference(cache):
    cache._pool.refs[cache.tables[0, 0]] += 1


def lost_reference(cache):
    cache._pool.refs[cache._rows.blocks(0)] = 0


def page_without_owner(cache):
    block = int(np.flatnonzero(cache._pool.pages.broken)[0])
    cache._pool.pages.page_used[block] = True


def page_with_two_owners(cache):
    table, _ = cache.page_table(next(iter(cache._paging.rows)))
    table[0, 1, 0] = table[0, 0, 0]


def packed_page_without_owner(cache):
    block = int(np.flatnonzero(cache._pool.packed.broken)[0])
    cache._pool.packed.page_used[block, 5] = True


def packed_page_with_two_owners(cache):
    table, _ = cache.packed_table(next(iter(cache._paging.rows)))
    table[0, 1, 0] = table[0, 0, 0]


def broken_for_both_sizes(cache):
    pages, packed = cache._pool.pages, cache._pool.packed
    block = int(np.flatnonzero(pages.broken)[0])
    packed.break_owned(np.array([block]))
    packed.page_used[block] = False
    packed.used[block] = 0


def loose_packed_pages_miscounted(cache):
    cache._pool.packed.num_loose += 1


def packed_pages_of_a_released_row(cache):
    row = next(iter(cache._paging.rows))
    cache._packing.rows[7] = cache._packing.rows.pop(row)


def index_of_wrong_block(cache):
    key = next(iter(cache._store.index.pairs()))
    cache._store.index._block_of[key] = 9


def pinned_but_absent(cache):
    cache._store.lifecycle.pinned[9] = True


def policy_forgot(cache):
    cache.policy.victims(1)


def announced_for_nobody(cache):
    cache._store.index.announce([b"x" * 32], 7)


def deadline_overlooked(cache):
    block = int(np.flatnonzero(cache._store.index.keyed)[0])
    cache._store.lifecycle.expiry.at[block] = 1.0


def computed_more_than_held(cache):
    cache.num_computed[0] = 1000


@pytest.mark.parametrize(
    "damage",
    [
        leak,
        free_twice,
        extra_reference,
        lost_reference,
        page_without_owner,
        page_with_two_owners,
        packed_page_without_owner,
        packed_page_with_two_owners,
        broken_for_both_sizes,
        loose_packed_pages_miscounted,
        packed_pages_of_a_released_row,
        index_of_wrong_block,
        pinned_but_absent,
        policy_forgot,
        announced_for_nobody,
        deadline_overlooked,
        computed_more_than_held,
    ],
)
def test_check_names_the_damage(busy, damage):
    damage(busy)
    with pytest.raises(InvariantError):
        busy.check()
