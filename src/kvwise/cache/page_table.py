"""A page table of one row: pages of one size per (layer, head), how it grows, shrinks and slides."""

import numpy as np
import numpy.typing as npt

from kvwise.cache.lanes import Bools, Int32, Lanes
from kvwise.cache.store import BlockStore
from kvwise.core.errors import UsageError

Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class PageTable:
    """`pages[l, h, i]` int32 [L, H, N] for i < `counts[l, h]` int32 [L, H]; the rest is 0.

    Pages come from `lanes` and return there. A change makes a new table: what `pages` was before is not written again.
    """

    def __init__(self, store: BlockStore, lanes: Lanes, pages: Int32, counts: Ints) -> None:
        self._store = store
        self._lanes = lanes
        self.pages = pages
        self.counts: Int32 = counts.astype(np.int32)

    @property
    def width(self) -> int:
        """N, entries of each (layer, head), used or not."""
        return int(self.pages.shape[-1])

    @property
    def lines(self) -> Int32:
        """The table as one line per (layer, head), [L*H, N], a view (N may be 0)."""
        return self.pages.reshape(self.counts.size, self.width)

    def owned(self) -> Int32:
        """Ids of all pages in the table, in table order."""
        return _cut(self.lines, np.zeros_like(self.counts), self.counts)

    def keep(self, start: Ints, stop: Ints, num_pages: Ints, width: int) -> bool:
        """Keep entries start <= i < stop of each line, then append pages up to `num_pages` (all [L, H]).

        Pages that are not kept serve as those appended; what is left of them is freed. Trusts that start <= stop <=
        counts, stop - start <= num_pages <= width, the new table's N. False, and nothing changed, if there is no room.
        """
        num_kept = stop - start
        wanted = int(num_pages.sum()) - int(num_kept.sum())
        gone = np.concatenate([_cut(self.lines, 0 * start, start), _cut(self.lines, stop, self.counts)])
        if not self._store.has_room(self._lanes, wanted - len(gone)):
            return False
        lines = np.zeros((num_pages.size, width), np.int32)
        _put(lines, 0 * start, num_kept, _cut(self.lines, start, stop))
        added = self._store.take_pages(self._lanes, max(wanted - len(gone), 0))
        _put(lines, num_kept, num_pages, np.concatenate([gone[:wanted], added]))
        self._store.pool.free_pages(self._lanes, gone[wanted:])
        self._set(lines, num_pages)
        return True

    def drop(self, gone: Bools) -> None:
        """Free the pages `gone` bool [L*H, N], which are some, and close the gaps; N becomes the largest count."""
        kept = used(self.counts, self.width) & ~gone
        counts = np.count_nonzero(kept, axis=1).reshape(self.counts.shape)
        lines = np.zeros((counts.size, int(counts.max(initial=0))), np.int32)
        _put(lines, np.zeros_like(counts), counts, self.lines[kept])
        self._store.pool.free_pages(self._lanes, self.lines[gone])
        self._set(lines, counts)

    def free(self) -> None:
        """Free every page; the table is not to be used again."""
        self._store.pool.free_pages(self._lanes, self.owned())

    def _set(self, lines: Int32, counts: Ints) -> None:
        self.pages = lines.reshape(*counts.shape, lines.shape[-1])
        self.counts = counts.astype(np.int32)


def used(counts: Ints, width: int) -> Bools:
    """Which of `width` places of each (layer, head) line are in use, bool [L*H, width]."""
    places: Bools = np.arange(width, dtype=np.int32) < counts.reshape(-1, 1).astype(np.int32)
    return places


def require_counts(counts: Ints, num_heads: int) -> None:
    """UsageError unless `counts` is [L, H] with L * H = `num_heads` and none is negative."""
    if counts.ndim != 2 or counts.size != num_heads or np.any(counts < 0):
        raise UsageError(f"num_pages of shape {counts.shape} must be [L, H], L*H = {num_heads}, no count negative")


def _cut(lines: Int32, start: Ints, stop: Ints) -> Int32:
    """Entries start <= i < stop of every line, one after another."""
    return lines[_between(start, stop, lines.shape[-1])].reshape(-1)


def _put(lines: Int32, start: Ints, stop: Ints, pages: Int32) -> None:
    """Write `pages` to entries start <= i < stop of every line, one after another."""
    places = _between(start, stop, lines.shape[-1])
    lines[places] = pages.reshape(lines[places].shape) if isinstance(places, tuple) else pages


def _between(start: Ints, stop: Ints, width: int) -> Bools | tuple[slice, slice]:
    """An index of those entries: slices where all lines are alike, the usual case, for they are far faster."""
    first, last = int(start.flat[0]), int(stop.flat[0])
    if (start == first).all() and (stop == last).all():
        return slice(None), slice(first, last)
    return used(stop, width) & ~used(start, width)
