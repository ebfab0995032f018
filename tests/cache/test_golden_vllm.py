"""The worked example of vLLM's docs/design/prefix_caching.md: block size 4, 10 blocks, times 1 to 7.

vLLM keeps free and cached blocks in one queue; here free blocks are handed out before any cached one is
evicted. So until time 6 all block numbers agree, and at time 7 the fifth new block is 6 (free) where vLLM
evicts 3 (cached).
"""

import numpy as np
import pytest

PROMPT_0 = list(range(15))  # 15 tokens, then it decodes
PROMPT_1 = [*range(10), 90, 91, 92, 93]  # first 10 as request 0
PROMPT_2 = [*range(12), *range(50, 67)]  # 29 tokens, first 12 as request 0


@pytest.fixture
def example(cache):
    """The cache after time 6, with the two rows released; each step is asserted on the way."""
    # Time 1: 4 blocks are taken, 3 of them full and cached.
    row_0 = cache.prefill(PROMPT_0)
    assert cache.blocks(row_0) == [0, 1, 2, 3]
    assert cache.found(PROMPT_0) == 12
    # Time 3: request 0 fills block 3, which is cached, and takes block 4.
    assert cache.reserve(row_0, 17)
    cache.extend_keys(row_0, np.array([12, 13, 14, 15]))
    cache.compute(row_0, 17)
    assert cache.blocks(row_0) == [0, 1, 2, 3, 4]
    assert cache.found([*range(16), 99]) == 16
    # Time 4: only 2 blocks hit, since the third matches in 2 of its 4 tokens.
    row_1 = cache.start(PROMPT_1)
    assert cache.num_computed[row_1] == 8
    assert cache.blocks(row_1) == [0, 1, 5, 6]
    cache.compute(row_1, 14)
    # Time 5: request 0 ends; 2 and 3 stay cached, 0 and 1 are still in use, 4 is free.
    cache.release(row_0)
    usage = cache.usage()
    assert (usage.num_cached, usage.num_free, usage.num_referenced) == (2, 4, 4)
    # Time 6: request 1 ends.
    cache.release(row_1)
    cache.check()
    return cache


def test_free_blocks_queue_in_vllms_order(example):
    assert example._pool.free_blocks().tolist() == [7, 8, 9, 4, 6]


def test_cached_blocks_leave_in_vllms_order(example):
    assert example.policy.victims(10).tolist() == [3, 2, 5, 1, 0]


def test_time_7_hits_are_taken_out_before_new_blocks(example):
    row_2 = example.start(PROMPT_2)
    assert example.num_computed[row_2] == 12
    assert example.blocks(row_2) == [0, 1, 2, 7, 8, 9, 4, 6]
    assert example.num_evicted == 0
    example.check()


def test_the_next_block_evicts_the_least_recent_and_deepest(example):
    row_2 = example.start(PROMPT_2)
    assert example.reserve(row_2, 33)
    assert example.blocks(row_2)[-1] == 3
    assert example.why([*range(16), 99]) == "evicted"
