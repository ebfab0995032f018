"""What holds each block, through all the states a block can be in."""

from collections import Counter

import numpy as np

from kvwise.cache.occupancy import Holder
from kvwise.cache.terms import Terms

PROMPT = list(range(13))


def held(cache):
    return Counter(Holder(value) for value in cache.occupancy().tolist())


def test_a_block_is_told_by_who_holds_it(cache, clock):
    assert held(cache) == {Holder.FREE: 10}
    row = cache.prefill(PROMPT)
    assert [Holder(v) for v in cache.occupancy()[cache.blocks(row)]] == [Holder.RUNNING] * 4
    other = cache.start([*PROMPT[:8], 90])
    assert held(cache) == {Holder.SHARED: 2, Holder.RUNNING: 3, Holder.FREE: 5}
    cache.release(other)
    cache.release(row)
    assert held(cache) == {Holder.CACHED: 3, Holder.FREE: 7}
    cache.pin(cache.keys(np.array(PROMPT[:8])), None)
    assert held(cache) == {Holder.PINNED: 2, Holder.CACHED: 1, Holder.FREE: 7}


def test_what_expires_soon_is_told(cache, clock):
    cache.release(cache.prefill(PROMPT, terms=Terms(expires_at=100.0)))
    assert held(cache) == {Holder.CACHED: 3, Holder.FREE: 7}
    clock.advance(40)
    assert held(cache) == {Holder.EXPIRING: 3, Holder.FREE: 7}
    assert Counter(cache.occupancy(59.0).tolist()) == {Holder.CACHED: 3, Holder.FREE: 7}


def test_broken_blocks_are_told(cache):
    row = cache.prefill(PROMPT)
    cache.paginate(row, np.full((2, 2), 1))
    cache.finish_paginate(row)
    count = held(cache)
    assert count[Holder.PAGES] == 1
    assert count[Holder.RUNNING] == 0
