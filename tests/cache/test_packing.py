"""Promises of packed pages and of sliding tables: two sizes share the blocks, order is kept, nothing leaks."""

import numpy as np
import pytest

from kvwise.core.errors import UsageError

PROMPT = list(range(15))


def counts(*heads):
    """Pages per (layer, head), two layers of two heads."""
    return np.array(heads if len(heads) > 1 else heads * 4).reshape(2, 2)


@pytest.fixture
def packer(make_cache):
    """Ten blocks of four pages or of six packed ones; nothing is shared."""
    return make_cache(sharing=False, packed_per_block=6)


def settled(cache, *heads):
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(*heads))
    cache.finish_paginate(row)
    return row


def lines(table):
    return table.reshape(4, table.shape[-1])


def test_packed_pages_come_from_blocks_of_their_own(packer):
    row = settled(packer, 1)
    assert packer.packed_table(row)[0].shape == (2, 2, 0)
    table = packer.grow_packed(row, counts(2, 1, 0, 4))
    assert table.dtype == np.int32 and table.shape == (2, 2, 4)
    pages = [page for line, n in zip(lines(table), (2, 1, 0, 4), strict=True) for page in line[:n].tolist()]
    assert len(set(pages)) == 7
    open_blocks = set(packer.page_table(row)[0].flat[:] // 4)
    assert not {page // 6 for page in pages} & open_blocks
    usage = packer.usage()
    assert (usage.num_packed, usage.num_packed_used, usage.num_packed_held, usage.num_packed_loose) == (60, 7, 7, 5)
    assert (usage.num_broken, usage.num_free, usage.num_pages_used, usage.num_pages_held) == (3, 7, 4, 4)
    packer.check()


def test_tokens_can_be_packed_from_the_old_table_before_the_compaction_ends(packer):
    row = packer.prefill(PROMPT)
    old = set(packer.blocks(row))
    packer.paginate(row, counts(1))
    table = packer.grow_packed(row, counts(3))
    assert not set((table // 6).flat) & old, "the old blocks are still read"
    packer.check()
    packer.finish_paginate(row)
    packer.check()
    assert packer.usage().num_free == 10 - 1 - 2


def test_growing_appends_and_leaves_earlier_tables_alone(packer):
    row = settled(packer, 1)
    first = packer.grow_packed(row, counts(2, 1, 0, 0))
    copy = first.copy()
    second = packer.grow_packed(row, counts(3, 1, 2, 0))
    assert np.array_equal(first, copy)
    assert second[0, 0, :2].tolist() == copy[0, 0, :2].tolist() and second[0, 1, 0] == copy[0, 1, 0]
    table, num_pages = packer.packed_table(row)
    assert np.array_equal(table, second) and num_pages.tolist() == [[3, 1], [2, 0]]
    packer.check()


def test_dropping_closes_the_gaps_in_order_and_makes_blocks_whole(packer):
    row = settled(packer, 1)
    before = lines(packer.grow_packed(row, counts(5, 3, 3, 1))).copy()
    gone = np.zeros((2, 2, 5), bool)
    gone[0, 0, [1, 3]] = gone[0, 1, :3] = gone[1, 0, 2] = True
    after = lines(packer.drop_packed(row, gone))
    assert after[0].tolist() == before[0, [0, 2, 4]].tolist()
    assert after[2].tolist() == [*before[2, :2], 0]
    assert after[3].tolist() == [before[3, 0], 0, 0]
    assert packer.packed_table(row)[1].tolist() == [[3, 0], [2, 1]]
    packer.check()
    free = packer.usage().num_free
    packer.drop_packed(row, np.array([3, 0, 2, 1]).reshape(2, 2, 1) > np.arange(3))
    assert packer.usage().num_free == free + 2
    assert packer.usage().num_packed_used == packer.usage().num_packed_loose == 0
    packer.check()


def test_a_dropped_packed_page_serves_the_next_row(packer):
    rows = [settled(packer, 0), settled(packer, 0)]
    table = packer.grow_packed(rows[0], counts(3, 3, 3, 3))
    gone = np.zeros((2, 2, 3), bool)
    gone[0, 0, 1] = True
    packer.drop_packed(rows[0], gone)
    assert packer.grow_packed(rows[1], counts(1, 0, 0, 0))[0, 0, 0] == table[0, 0, 1]
    packer.check()


def test_packed_pages_fill_the_fullest_block_first(packer):
    rows = [settled(packer, 0) for _ in range(3)]
    tables = [packer.grow_packed(row, counts(6, 0, 0, 0)) for row in rows[:2]]
    for row, num_kept in zip(rows, (1, 4), strict=False):
        packer.drop_packed(row, (np.arange(6) >= num_kept) & (counts(1, 0, 0, 0)[..., None] > 0))
    table = packer.grow_packed(rows[2], counts(2, 0, 0, 0))
    assert sorted(table[0, 0]) == sorted(tables[1][0, 0, 4:]), "four of six used there, one of six in the first block"
    packer.check()


def test_release_frees_both_sizes(packer):
    row = settled(packer, 2)
    packer.grow_packed(row, counts(3))
    packer.release(row)
    usage = packer.usage()
    assert (usage.num_free, usage.num_packed_used, usage.num_packed_loose) == (10, 0, 0)
    packer.check()
    half = packer.prefill(PROMPT)
    packer.paginate(half, counts(1))
    packer.grow_packed(half, counts(2))
    packer.release(half)
    assert packer.usage().num_free == 10
    packer.check()


def test_without_room_nothing_is_packed(make_cache):
    cache = make_cache(num_blocks=5, sharing=False, packed_per_block=6)
    row = settled(cache, 1)
    assert cache.grow_packed(row, counts(6)) is not None
    before, table = cache.usage(), cache.packed_table(row)
    assert cache.grow_packed(row, counts(7, 6, 6, 6)) is None
    assert cache.usage() == before and cache.packed_table(row)[0] is table[0]
    assert cache.num_available == 0
    cache.check()


def test_packing_evicts_what_is_merely_cached(make_cache):
    cache = make_cache(num_blocks=5, packed_per_block=6)
    cache.release(cache.prefill(list(range(12))))
    row = cache.prefill([70])
    cache.paginate(row, counts(1, 0, 0, 0))
    cache.finish_paginate(row)
    assert cache.grow_packed(row, counts(6)) is not None
    assert cache.num_evicted == 3
    cache.check()


def test_the_two_sizes_never_share_a_block(packer):
    row = settled(packer, 1, 1, 1, 0)
    packer.grow_packed(row, counts(1, 0, 0, 0))
    usage = packer.usage()
    assert (usage.num_pages_loose, usage.num_packed_loose) == (1, 5)
    packer.grow_pages(row, counts(1, 1, 1, 1))
    packer.grow_packed(row, counts(3, 3, 0, 0))
    assert packer.usage().num_broken == 2
    packer.grow_pages(row, counts(1, 1, 1, 2))
    assert packer.usage().num_broken == 3
    packer.check()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda cache, row: cache.grow_packed(row, counts(1, 2, 2, 2)), "use drop_packed"),
        (lambda cache, row: cache.grow_packed(row, np.ones((3, 2), int)), "L\\*H = 4"),
        (lambda cache, row: cache.grow_packed(cache.prefill([1]), counts(1)), "call paginate first"),
        (lambda cache, row: cache.drop_packed(row, np.ones((2, 2, 3), bool)), "\\[2, 2, 2\\]"),
        (lambda cache, row: cache.drop_packed(row, np.ones((2, 2, 2), int)), "give a bool"),
        (lambda cache, row: cache.shift_pages(row, counts(3, 0, 0, 0), counts(1)), "cannot be dropped"),
        (lambda cache, row: cache.shift_pages(row, counts(-1), counts(1)), "negative"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(packer, call, words):
    row = settled(packer, 2)
    packer.grow_packed(row, counts(2))
    before = packer.packed_table(row)[0]
    with pytest.raises(UsageError, match=words):
        call(packer, row)
    assert packer.packed_table(row)[0] is before
    packer.check()


def test_an_entry_that_is_no_page_cannot_be_dropped(packer):
    row = settled(packer, 0)
    packer.grow_packed(row, counts(2, 1, 0, 0))
    with pytest.raises(UsageError, match="5 entries of row"):
        packer.drop_packed(row, np.ones((2, 2, 2), bool))
    packer.check()


def test_a_pool_without_packed_pages_says_so(cache):
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(1))
    cache.finish_paginate(row)
    assert cache.grow_packed(row, counts(0)).shape == (2, 2, 0)
    with pytest.raises(UsageError, match="packed_per_block >= 1"):
        cache.grow_packed(row, counts(1))
    cache.release(row)
    cache.check()


def test_packed_ids_must_fit_int32(make_cache):
    with pytest.raises(UsageError, match="int32"):
        make_cache(num_blocks=2, packed_per_block=2**31 - 1)
    with pytest.raises(UsageError, match="packed_per_block is -1"):
        make_cache(packed_per_block=-1)


# -- sliding -----------------------------------------------------------------------------------------------------


def test_shifting_drops_at_the_front_and_keeps_the_order(packer):
    row = settled(packer, 4, 3, 2, 1)
    before = lines(packer.page_table(row)[0]).copy()
    after = lines(packer.shift_pages(row, counts(2, 0, 2, 1), counts(1, 3, 1, 0)))
    assert after[0].tolist() == [before[0, 2], 0, 0], "trimmed at the end too"
    assert after[1].tolist() == before[1, :3].tolist()
    assert after[3].tolist() == [0, 0, 0]
    assert packer.page_table(row)[1].tolist() == [[1, 3], [1, 0]]
    assert packer.usage().num_pages_used == 5
    packer.check()


def test_a_page_that_is_dropped_serves_as_the_one_added(make_cache):
    cache = make_cache(num_blocks=4, sharing=False)
    row = settled(cache, 4)
    assert cache.usage().num_free == cache.usage().num_pages_loose == 0
    before = lines(cache.page_table(row)[0]).copy()
    after = lines(cache.shift_pages(row, counts(1), counts(4)))
    assert np.array_equal(after[:, :3], before[:, 1:])
    assert sorted(after[:, 3]) == sorted(before[:, 0])
    cache.check()
    assert cache.shift_pages(row, counts(1, 0, 0, 0), counts(4, 4, 4, 5)) is None
    assert np.array_equal(lines(cache.page_table(row)[0]), after)
    assert cache.shift_pages(row, counts(1, 0, 0, 0), counts(3, 4, 4, 5)) is not None
    cache.check()


def test_shifting_takes_fresh_pages_where_the_dropped_ones_are_too_few(packer):
    row = settled(packer, 1)
    table = packer.shift_pages(row, counts(1, 0, 0, 0), counts(2))
    assert len(set(table.flat)) == 8
    assert packer.usage().num_pages_used == 8
    packer.check()


def test_shifting_before_the_bytes_are_moved_is_refused(cache):
    row = cache.prefill(PROMPT)
    cache.paginate(row, counts(1))
    with pytest.raises(UsageError, match="finish_paginate first"):
        cache.shift_pages(row, counts(0), counts(1))
