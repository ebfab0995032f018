"""Packed pages per (sequence, layer, head): small pages that hold tokens in codes, beside a row's open pages."""

import numpy as np

from kvwise.cache.lanes import Bools, Int32
from kvwise.cache.page_table import Ints, PageTable, require_counts, used
from kvwise.cache.paging import Paging
from kvwise.cache.store import BlockStore
from kvwise.core.errors import UsageError


class Packing:
    """Packed page tables of rows that hold pages; a row has none until it first grows some."""

    def __init__(self, store: BlockStore, paging: Paging) -> None:
        self._store = store
        self._paging = paging
        self.rows: dict[int, PageTable] = {}

    def grow(self, row: int, num_pages: Ints) -> Int32 | None:
        """See `CacheManager.grow_packed`."""
        table = self.table(row)
        require_counts(num_pages, table.counts.size)
        if np.any(num_pages < table.counts):
            raise UsageError(f"grow_packed cannot shrink row {row}: use drop_packed")
        if not self._store.pool.packed.per_block and num_pages.any():
            raise UsageError("this pool has no packed pages: make the CacheManager with packed_per_block >= 1")
        width = max(int(num_pages.max(initial=0)), table.width)
        if not table.keep(np.zeros_like(table.counts), table.counts, num_pages, width):
            return None
        self.rows[row] = table
        return table.pages

    def drop(self, row: int, gone: Bools) -> Int32:
        """See `CacheManager.drop_packed`."""
        table = self.table(row)
        if gone.shape != table.pages.shape or gone.dtype != np.bool_:
            raise UsageError(
                f"gone is {gone.dtype} {list(gone.shape)}, but the packed tables of row {row} are "
                f"{list(table.pages.shape)}: give a bool for each of their entries"
            )
        lines = gone.reshape(table.lines.shape)
        if num_unused := np.count_nonzero(lines & ~used(table.counts, table.width)):
            raise UsageError(
                f"gone names {num_unused} entries of row {row} that are no pages: see the counts of packed_table"
            )
        table.drop(lines)
        return table.pages

    def table(self, row: int) -> PageTable:
        """The row's packed pages, maybe none; UsageError if it holds whole blocks."""
        held = self._paging.require(row)
        if row in self.rows:
            return self.rows[row]
        shape = held.table.counts.shape
        empty = np.zeros((*shape, 0), np.int32)
        return PageTable(self._store, self._store.pool.packed, empty, np.zeros(shape, np.int32))

    def release(self, row: int) -> None:
        """Free the packed pages of the row, if it has any."""
        if row in self.rows:
            self.rows.pop(row).free()
