"""`check` must notice: each test breaks one promise from inside and sees it named."""

import numpy as np
import pytest

from kvwise.core.errors import InvariantError

PROMPT = list(range(13))


@pytest.fixture
def busy(cache):
    """One referenced row, three idle blocks, one row with pages, one announced key."""
    cache.release(cache.prefill(PROMPT))
    cache.prefill([70, 71, 72])
    row = cache.prefill([80, 81])
    cache.paginate(row, np.array([[1, 1], [1, 0]]))
    cache.finish_paginate(row)
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
    block = int(np.flatnonzero(cache._pool.broken)[0])
    cache._pool.page_used[block] = True


def page_with_two_owners(cache):
    table, _ = next((held.pages, held.counts) for held in cache._paging.rows.values())
    table[0, 1, 0] = table[0, 0, 0]


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
