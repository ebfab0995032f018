"""Page tables per (sequence, layer, head): for methods that keep different tokens in each head."""

from dataclasses import dataclass

import numpy as np

from kvwise.cache.lanes import Bools, Int32
from kvwise.cache.misses import RemovalReason
from kvwise.cache.page_table import Ints, PageTable, require_counts, used
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import UNBOUNDED, SequenceTables
from kvwise.core.errors import InvariantError, UsageError
from kvwise.policies.base import Blocks


@dataclass(slots=True)
class Paged:
    """What a row with pages holds.

    `in_place` (only until `finish`): which blocks of the row's old table were broken and are wholly this
    row's.
    """

    table: PageTable
    in_place: Bools | None


class Paging:
    """Moves rows from block tables to page tables; pages come from and return to the one pool."""

    def __init__(self, store: BlockStore, tables: SequenceTables) -> None:
        self._store = store
        self._tables = tables
        self._lanes = store.pool.pages
        self.rows: dict[int, Paged] = {}

    def paginate(self, row: int, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.paginate`."""
        require_counts(num_pages, self._lanes.per_block)
        if row in self.rows:
            raise UsageError(f"row {row} already holds pages: use grow_pages or trim_pages")
        blocks = self._tables.blocks(row)
        withdrawn = self._blocks_to_withdraw(blocks, num_pages)
        if withdrawn is None:
            return None
        self._store.withdraw(withdrawn, RemovalReason.WITHDRAWN)
        in_place = self._private(blocks)
        self._store.pool.break_owned(blocks[in_place])
        pages = self._build(blocks, in_place, num_pages)
        self.rows[row] = Paged(PageTable(self._store, self._lanes, pages, num_pages), in_place)
        self._tables.capacity[row] = UNBOUNDED
        return pages

    def finish(self, row: int) -> None:
        """Free the pages the table does not use; drop the shared and published blocks."""
        held = self.require(row)
        if held.in_place is None:
            raise InvariantError(f"row {row} has no compaction under way: call paginate first")
        blocks = self._tables.blocks(row)
        broken, surplus = self._surplus(blocks, held)
        self._store.pool.push(self._lanes.free_lanes(broken, surplus))
        self._store.let_go(blocks[~held.in_place])
        held.in_place = None
        self._tables.num_blocks[row] = 0

    def grow(self, row: int, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.grow_pages`."""
        table = self._settled(row, num_pages)
        if np.any(num_pages < table.counts):
            raise UsageError(f"grow_pages cannot shrink row {row}: use trim_pages")
        width = max(int(num_pages.max(initial=0)), table.width)
        start = np.zeros_like(table.counts)
        return table.pages if table.keep(start, table.counts, num_pages, width) else None

    def trim(self, row: int, num_pages: Ints) -> Int32:
        """See `CacheManager.trim_pages`."""
        table = self._settled(row, num_pages)
        if np.any(num_pages > table.counts):
            raise UsageError(f"trim_pages cannot enlarge row {row}: use grow_pages")
        table.keep(np.zeros_like(num_pages), num_pages, num_pages, table.width)
        return table.pages

    def shift(self, row: int, num_dropped: Ints, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.shift_pages`."""
        table = self._settled(row, num_pages)
        require_counts(num_dropped, self._lanes.per_block)
        if np.any(num_dropped > table.counts):
            raise UsageError(
                f"row {row} holds {table.counts.tolist()} pages, of which {num_dropped.tolist()} cannot be dropped: "
                "drop at most what page_table counts"
            )
        stop = np.minimum(num_dropped + num_pages, table.counts)
        width = int(num_pages.max(initial=0))
        return table.pages if table.keep(num_dropped, stop, num_pages, width) else None

    def release(self, row: int) -> None:
        """Free every page of the row, also in the midst of a compaction."""
        held = self.require(row)
        if held.in_place is not None:
            self.finish(row)
        held.table.free()
        del self.rows[row]

    def require(self, row: int) -> Paged:
        """What the row holds in pages; UsageError if it holds whole blocks."""
        if row not in self.rows:
            raise UsageError(f"row {row} holds whole blocks: call paginate first")
        return self.rows[row]

    def pages_held(self, row: int) -> Ints:
        """All page ids the row owns now, including those a compaction under way will free."""
        held = self.rows[row]
        if held.in_place is None:
            return held.table.owned()
        blocks, surplus = self._surplus(self._tables.blocks(row), held)
        return np.concatenate([held.table.owned(), self._lanes.pages_of(blocks)[surplus]])

    def _private(self, blocks: Blocks) -> Bools:
        private: Bools = (self._store.pool.refs[blocks] == 1) & ~self._store.index.keyed[blocks]
        return private

    def _blocks_to_withdraw(self, blocks: Blocks, num_pages: Ints) -> Blocks | None:
        """The fewest own published blocks, deepest first, to rewrite in place; None if all are too few.

        A block at index i saves as many fresh pages as there are heads that keep more than i pages.
        """
        store, pool = self._store, self._store.pool
        depth = np.arange(len(blocks))
        saved = (num_pages.reshape(-1, 1) > depth).sum(axis=0)
        wanted = int(num_pages.sum()) - int(saved[self._private(blocks)].sum())
        own = (pool.refs[blocks] == 1) & store.index.keyed[blocks] & ~store.lifecycle.pinned[blocks] & (saved > 0)
        candidates = np.flatnonzero(own)[::-1]
        for count in range(len(candidates) + 1):
            if store.has_room(self._lanes, wanted - int(saved[candidates[:count]].sum())):
                return blocks[candidates[:count]]
        return None

    def _build(self, blocks: Blocks, in_place: Bools, num_pages: Ints) -> Int32:
        """Page table [L, H, N]: column i is block i's pages if it was broken in place, else fresh ones."""
        width = int(num_pages.max(initial=0))
        lines = np.zeros((num_pages.size, width), np.int32)
        own = np.flatnonzero(in_place[:width])
        lines[:, own] = self._lanes.pages_of(blocks[own]).T
        places = used(num_pages, width)
        lines[~places] = 0
        places[:, own] = False
        lines[places] = self._store.take_pages(self._lanes, int(np.count_nonzero(places)))
        return lines.reshape(*num_pages.shape, width)

    def _surplus(self, blocks: Blocks, held: Paged) -> tuple[Blocks, Bools]:
        """The blocks [n] broken in place, and which of their pages [n, L*H] the table does not use."""
        assert held.in_place is not None
        depth = np.flatnonzero(held.in_place)
        return blocks[depth], held.table.counts.reshape(1, -1) <= depth[:, None].astype(np.int32)

    def _settled(self, row: int, num_pages: Ints) -> PageTable:
        require_counts(num_pages, self._lanes.per_block)
        held = self.require(row)
        if held.in_place is not None:
            raise UsageError(f"row {row} has a compaction under way: call finish_paginate first")
        return held.table
