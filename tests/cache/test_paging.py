"""Promises of page tables: memory a method frees really returns, and what others may hit is not rewritten."""

import numpy as np
import pytest

from kvwise.core.errors import UsageError

PROMPT = list(range(15))


def counts(*heads):
    """Pages per (layer, head), two layers of two heads."""
    return np.array(heads if len(heads) > 1 else heads * 4).reshape(2, 2)


def pages_of(table, num_pages):
    return [page for line, n in zip(table.reshape(4, -1), num_pages.flat, strict=True) for page in line[:n]]


def test_private_blocks_are_reused_in_place(make_cache):
    cache = make_cache(sharing=False)
    row = cache.prefill(PROMPT)
    table = cache.paginate(row, counts(2))
    block_0, block_1 = cache.blocks(row)[:2]
    for lane, line in enumerate(table.reshape(4, -1)):
        assert line.tolist() == [block_0 * 4 + lane, block_1 * 4 + lane]
    assert cache.usage().num_free == 6, "nothing is freed while bytes may still be read"
    cache.finish_paginate(row)
    assert cache.usage().num_free == 8
    assert cache.usage().num_pages_used == 8
    cache.check()


def test_published_blocks_stay_published_and_the_row_gets_fresh_pages(cache):
    row = cache.prefill(PROMPT)
    published = cache.blocks(row)[:3]
    num_pages = counts(2)
    table = cache.paginate(row, num_pages)
    assert not set(np.array(pages_of(table, num_pages)) // 4) & set(published)
    assert cache.found(PROMPT) == 12
    cache.finish_paginate(row)
    usage = cache.usage()
    assert (usage.num_cached, usage.num_referenced, usage.num_broken) == (3, 0, 2)
    assert cache.found(PROMPT) == 12
    cache.check()


def test_shared_blocks_are_copied_and_only_unreferenced(cache):
    other = cache.prefill(PROMPT)
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(1))
    cache.finish_paginate(row)
    assert cache.blocks(other) == [0, 1, 2, 3]
    cache.check()


def test_only_for_lack_of_room_own_published_blocks_are_rewritten_deepest_first(make_cache):
    cache = make_cache(num_blocks=5)
    row = cache.prefill(list(range(16)))
    table = cache.paginate(row, counts(3))
    # One block is free, so three columns of pages need two more: those of columns 2 and 1, the deepest first.
    assert table[0, 0, 2] // 4 == cache.blocks(row)[2]
    assert table[0, 0, 1] // 4 == cache.blocks(row)[1]
    assert cache.found(list(range(17))) == 4
    assert cache.why(list(range(17))) == "withdrawn"
    cache.finish_paginate(row)
    cache.check()


def test_without_any_room_nothing_changes(make_cache):
    cache = make_cache(num_blocks=4)
    holder = cache.prefill(list(range(16)))
    row = cache.admit(cache.match(cache.keys(np.arange(16)), 17), cache.keys(np.arange(16)), 17)
    before = cache.usage()
    assert cache.paginate(row, counts(1)) is None
    assert cache.usage() == before
    assert not cache.holds_pages(row)
    assert cache.found(list(range(17))) == 16
    cache.release(holder)
    cache.check()


def test_a_pinned_block_is_never_rewritten(make_cache):
    cache = make_cache(num_blocks=4)
    row = cache.prefill(list(range(16)))
    cache.pin(cache.keys(np.arange(16)))
    assert cache.paginate(row, counts(1)) is None
    cache.check()


def test_heads_may_keep_different_numbers_of_pages(make_cache):
    cache = make_cache(sharing=False)
    row = cache.prefill(PROMPT)
    num_pages = counts(4, 1, 0, 2)
    table = cache.paginate(row, num_pages)
    cache.finish_paginate(row)
    assert table.shape == (2, 2, 4)
    assert cache.usage().num_pages_used == 7
    owned = pages_of(table, num_pages)
    assert len(set(owned)) == 7
    cache.check()
    cache.release(row)
    assert cache.usage().num_free == 10
    cache.check()


def test_freed_pages_of_one_head_serve_any_other(make_cache):
    cache = make_cache(num_blocks=4, sharing=False)
    row = cache.prefill(list(range(8)))
    cache.paginate(row, counts(2, 0, 0, 0))
    cache.finish_paginate(row)
    other = cache.start([50])
    assert cache.reserve(other, 8), "two whole blocks are free"
    table = cache.grow_pages(row, counts(2, 2, 2, 2))
    assert table is not None
    assert cache.usage().num_pages_loose == 0
    assert cache.grow_pages(row, counts(3, 2, 2, 2)) is None
    cache.check()


def test_pages_come_from_the_fullest_broken_block_so_that_others_become_whole(make_cache):
    cache = make_cache(num_blocks=3, sharing=False)
    sparse, full = cache.prefill([1]), cache.prefill([2])
    cache.paginate(full, counts(1, 1, 1, 0))
    cache.finish_paginate(full)
    cache.paginate(sparse, counts(1, 0, 0, 0))
    cache.finish_paginate(sparse)
    grown = cache.grow_pages(sparse, counts(1, 1, 0, 0))
    assert grown[0, 1, 0] // 4 == 1, "the free page of the block that has three of four used"
    cache.check()
    cache.release(sparse)
    assert cache.usage().num_free == 2
    cache.check()


def test_growing_evicts_cached_blocks_but_not_referenced_ones(make_cache):
    cache = make_cache(num_blocks=4)
    cache.release(cache.prefill(list(range(8))))
    row = cache.prefill([70, 71])
    cache.paginate(row, counts(1))
    cache.finish_paginate(row)
    assert cache.grow_pages(row, counts(4)) is not None
    assert cache.num_evicted == 2
    assert cache.grow_pages(row, counts(5)) is None
    cache.check()


def test_trimming_returns_whole_blocks(make_cache):
    cache = make_cache(sharing=False)
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(4))
    cache.finish_paginate(row)
    cache.trim_pages(row, counts(1, 1, 1, 2))
    table, num_pages = cache.page_table(row)
    assert num_pages.tolist() == [[1, 1], [1, 2]]
    assert table[0, 0, 1] == 0
    assert cache.usage().num_free == 8
    assert cache.usage().num_pages_loose == 3
    cache.check()


@pytest.mark.parametrize("finished", [False, True])
def test_release_at_any_moment_frees_exactly_once(cache, finished):
    cache.prefill(PROMPT)
    row = cache.prefill([*PROMPT[:8], 90, 91, 92, 93, 94])
    cache.paginate(row, counts(3, 2, 1, 0))
    if finished:
        cache.finish_paginate(row)
    cache.check()
    cache.release(row)
    cache.check()
    assert cache.usage().num_pages_loose == 0


def test_a_row_with_pages_publishes_nothing_more(cache):
    row = cache.start(PROMPT)
    cache.compute(row, 4)
    cache.paginate(row, counts(1))
    cache.finish_paginate(row)
    cache.compute(row, 15)
    assert cache.found(PROMPT) == 4
    assert cache.match(cache.keys(np.array(PROMPT)), 15).num_pending == 0
    cache.check()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda cache, row: cache.finish_paginate(row), "paginate first"),
        (lambda cache, row: cache.grow_pages(row, counts(1)), "paginate first"),
        (lambda cache, row: cache.paginate(row, np.ones((3, 2), int)), "L\\*H = 4"),
        (lambda cache, row: cache.paginate(row, counts(-1)), "negative"),
    ],
)
def test_wrong_order_or_shape_is_refused(cache, call, words):
    row = cache.prefill(PROMPT)
    with pytest.raises(UsageError, match=words):
        call(cache, row)
    cache.check()


def test_growing_before_the_bytes_are_moved_is_refused(cache):
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(1))
    with pytest.raises(UsageError, match="finish_paginate first"):
        cache.grow_pages(row, counts(2))
    cache.finish_paginate(row)
    with pytest.raises(UsageError, match="use trim_pages"):
        cache.grow_pages(row, counts(0))
    with pytest.raises(UsageError, match="use grow_pages"):
        cache.trim_pages(row, counts(2))


def test_a_head_may_keep_nothing_at_all(cache):
    row = cache.prefill(PROMPT)
    assert cache.paginate(row, counts(0)).shape == (2, 2, 0)
    cache.finish_paginate(row)
    assert cache.usage().num_referenced == 0
    cache.check()
    assert cache.grow_pages(row, counts(0)).shape == (2, 2, 0)
    assert cache.trim_pages(row, counts(0)).shape == (2, 2, 0)
    assert cache.grow_pages(row, counts(1)).shape == (2, 2, 1)
    cache.check()


def test_a_block_shared_with_a_fork_is_not_rewritten(make_cache):
    cache = make_cache(sharing=False)
    row = cache.prefill(list(range(8)))
    twin, _ = cache.fork(row)
    table = cache.paginate(twin, counts(1))
    assert not set(table.flat) & {block * 4 + lane for block in cache.blocks(row) for lane in range(4)}
    cache.finish_paginate(twin)
    cache.check()
