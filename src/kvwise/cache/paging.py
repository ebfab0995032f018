"""Page tables per (sequence, layer, head): for methods that keep different tokens in each head."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvwise.cache.misses import RemovalReason
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import UNBOUNDED, SequenceTables
from kvwise.core.errors import InvariantError, UsageError
from kvwise.policies.base import Blocks

Int32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class PageTable:
    """Pages of one row: `pages[l, h, i]` int32 [L, H, N] for i < `counts[l, h]`; the rest is unused.

    `in_place` (only until `finish`): which blocks of the row's old table were broken and are wholly this
    row's.
    """

    pages: Int32
    counts: Int32
    in_place: Bools | None

    @property
    def lines(self) -> Int32:
        """The table as one line per (layer, head), [L*H, N], a view (N may be 0)."""
        return self.pages.reshape(self.counts.size, self.pages.shape[-1])

    def owned(self) -> Int32:
        """Ids of all pages in the table, in table order."""
        return self.lines[_used(self.counts, self.pages.shape[-1])]


class Paging:
    """Moves rows from block tables to page tables; pages come from and return to the one pool."""

    def __init__(self, store: BlockStore, tables: SequenceTables) -> None:
        self._store = store
        self._tables = tables
        self.rows: dict[int, PageTable] = {}

    def paginate(self, row: int, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.paginate`."""
        self._require_shape(num_pages)
        if row in self.rows:
            raise UsageError(f"row {row} already holds pages: use grow_pages or trim_pages")
        blocks = self._tables.blocks(row)
        withdrawn = self._blocks_to_withdraw(blocks, num_pages)
        if withdrawn is None:
            return None
        self._store.withdraw(withdrawn, RemovalReason.WITHDRAWN)
        in_place = self._private(blocks)
        self._store.pool.break_owned(blocks[in_place])
        table = self._build(blocks, in_place, num_pages)
        self.rows[row] = PageTable(table, num_pages.astype(np.int32), in_place)
        self._tables.capacity[row] = UNBOUNDED
        return table

    def finish(self, row: int) -> None:
        """Free the pages the table does not use; drop the shared and published blocks."""
        held = self.require(row)
        if held.in_place is None:
            raise InvariantError(f"row {row} has no compaction under way: call paginate first")
        blocks = self._tables.blocks(row)
        self._store.pool.free_pages(self._surplus(blocks, held))
        self._store.let_go(blocks[~held.in_place])
        held.in_place = None
        self._tables.num_blocks[row] = 0

    def grow(self, row: int, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.grow_pages`."""
        held = self._require_settled(row, num_pages)
        if np.any(num_pages < held.counts):
            raise UsageError(f"grow_pages cannot shrink row {row}: use trim_pages")
        wanted = int((num_pages - held.counts).sum())
        if not self._room_for(wanted):
            return None
        width = max(int(num_pages.max(initial=0)), held.pages.shape[-1])
        pages = np.zeros((*held.counts.shape, width), np.int32)
        pages[..., : held.pages.shape[-1]] = held.pages
        added = _used(num_pages, width) & ~_used(held.counts, width)
        pages.reshape(num_pages.size, width)[added] = self._take(wanted)
        held.pages, held.counts = pages, num_pages.astype(np.int32)
        return pages

    def trim(self, row: int, num_pages: Ints) -> Int32:
        """See `CacheManager.trim_pages`."""
        held = self._require_settled(row, num_pages)
        if np.any(num_pages > held.counts):
            raise UsageError(f"trim_pages cannot enlarge row {row}: use grow_pages")
        width = held.pages.shape[-1]
        gone = _used(held.counts, width) & ~_used(num_pages, width)
        self._store.pool.free_pages(held.lines[gone])
        held.lines[gone] = 0
        held.counts = num_pages.astype(np.int32)
        return held.pages

    def release(self, row: int) -> None:
        """Free every page of the row, also in the midst of a compaction."""
        held = self.require(row)
        if held.in_place is not None:
            self.finish(row)
        self._store.pool.free_pages(held.owned())
        del self.rows[row]

    def require(self, row: int) -> PageTable:
        """The row's page table; UsageError if it holds whole blocks."""
        if row not in self.rows:
            raise UsageError(f"row {row} holds whole blocks: call paginate first")
        return self.rows[row]

    def pages_held(self, row: int) -> Ints:
        """All page ids the row owns now, including those a compaction under way will free."""
        held = self.rows[row]
        if held.in_place is None:
            return held.owned()
        return np.concatenate([held.owned(), self._surplus(self._tables.blocks(row), held)])

    def _private(self, blocks: Blocks) -> Bools:
        private: Bools = (self._store.pool.refs[blocks] == 1) & ~self._store.index.keyed[blocks]
        return private

    def _room_for(self, num_pages: int) -> bool:
        return self._store.pool.blocks_to_break(num_pages) <= self._store.num_available

    def _take(self, num_pages: int) -> Blocks:
        fresh = self._store.take(self._store.pool.blocks_to_break(num_pages))
        return self._store.pool.take_pages(num_pages, fresh)

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
            if self._room_for(wanted - int(saved[candidates[:count]].sum())):
                return blocks[candidates[:count]]
        return None

    def _build(self, blocks: Blocks, in_place: Bools, num_pages: Ints) -> Int32:
        """Page table [L, H, N]: column i is block i's pages if it was broken in place, else fresh ones."""
        width = int(num_pages.max(initial=0))
        lines = np.zeros((num_pages.size, width), np.int32)
        own = np.flatnonzero(in_place[:width])
        lines[:, own] = self._store.pool.pages_of(blocks[own]).T
        used = _used(num_pages, width)
        fresh = used.copy()
        fresh[:, own] = False
        lines[fresh] = self._take(int(np.count_nonzero(fresh)))
        lines[~used] = 0
        return lines.reshape(*num_pages.shape, width)

    def _surplus(self, blocks: Blocks, held: PageTable) -> Blocks:
        """Pages of blocks broken in place that the table does not use."""
        assert held.in_place is not None
        depth = np.flatnonzero(held.in_place)
        pages = self._store.pool.pages_of(blocks[depth])
        return pages[held.counts.reshape(1, -1) <= depth[:, None]]

    def _require_settled(self, row: int, num_pages: Ints) -> PageTable:
        self._require_shape(num_pages)
        held = self.require(row)
        if held.in_place is not None:
            raise UsageError(f"row {row} has a compaction under way: call finish_paginate first")
        return held

    def _require_shape(self, num_pages: Ints) -> None:
        lanes = self._store.pool.pages_per_block
        if num_pages.ndim != 2 or num_pages.size != lanes or np.any(num_pages < 0):
            raise UsageError(f"num_pages of shape {num_pages.shape} must be [L, H], L*H = {lanes}, no count negative")


def _used(counts: Ints, width: int) -> Bools:
    """Which of `width` places of each (layer, head) line are in use, bool [L*H, width]."""
    used: Bools = np.arange(width) < counts.reshape(-1, 1)
    return used
