"""Lanes: blocks that are broken into pages of one size, and which of those pages have an owner."""

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks

Int32 = npt.NDArray[np.int32]
Pages = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Lanes:
    """Arrays over all blocks, of those broken into `per_block` pages: page p is lane p % per_block of block
    p // per_block.

    `broken` bool [num_blocks]; `used` int32 [num_blocks]: pages of a broken block that have an owner (at least one,
    else it is made whole); `page_used` bool [num_blocks, per_block]: which. A pool of several page sizes has one
    `Lanes` for each, and a block is broken in at most one of them. `per_block` may be 0: no page can be had then.
    Methods trust their caller, as `BlockPool` does.
    """

    def __init__(self, num_blocks: int, per_block: int) -> None:
        self.per_block = per_block
        self.broken: Bools = np.zeros(num_blocks, np.bool_)
        self.used: Int32 = np.zeros(num_blocks, np.int32)
        self.page_used: Bools = np.zeros((num_blocks, per_block), np.bool_)
        self.num_broken = 0
        self.num_loose = 0  # unowned pages of broken blocks
        self._lanes = np.arange(per_block, dtype=np.int32)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.num_broken * self.per_block - self.num_loose

    def pages_of(self, blocks: Blocks) -> Int32:
        """All page ids of `blocks`, [n, per_block]."""
        pages: Int32 = blocks[:, None].astype(np.int32) * np.int32(self.per_block) + self._lanes
        return pages

    def break_owned(self, blocks: Blocks) -> None:
        """Break whole `blocks`; every page of them has an owner."""
        self.broken[blocks] = True
        self.used[blocks] = self.per_block
        self.page_used[blocks] = True
        self.num_broken += len(blocks)

    def blocks_to_break(self, num_pages: int) -> int:
        """Whole blocks that must be broken to hand out `num_pages` pages."""
        short = num_pages - self.num_loose
        return -(-short // self.per_block) if short > 0 else 0

    def take(self, num_pages: int, fresh: Blocks) -> Int32:
        """Hand out `num_pages` pages: of the fullest broken blocks first, then of the blocks `fresh`.

        Filling the fullest first lets the others run empty and become whole again. `fresh` must be exactly as
        many as `blocks_to_break` says.
        """
        loose = self._take_loose(min(num_pages, self.num_loose))
        if not len(fresh):
            return loose
        fresh = np.sort(fresh)
        self.break_owned(fresh)
        pages = np.concatenate([loose, self.pages_of(fresh).reshape(-1)])
        self._disown(pages[num_pages:], fresh[-1:])
        return pages[:num_pages]

    def free(self, pages: Pages) -> Blocks:
        """Take pages back; the blocks that are whole again, which the caller puts where free blocks go."""
        self.page_used.reshape(-1)[pages] = False
        counts = self._per_block(pages)
        return self._shrink(counts, len(pages))

    def free_lanes(self, blocks: Blocks, gone: Bools) -> Blocks:
        """As `free`, for the pages of the distinct `blocks` [n] that are `gone` [n, per_block]: fast for very many."""
        self.page_used[blocks] &= ~gone
        counts = np.zeros(len(self.used), np.int64)
        counts[blocks] = gone.view(np.uint8).sum(axis=1, dtype=np.int32)
        return self._shrink(counts, int(counts.sum()))

    def _shrink(self, counts: Blocks, num_pages: int) -> Blocks:
        """`num_pages` pages, `counts` [num_blocks] of each block, have lost their owner; the blocks whole again."""
        self.used -= counts
        whole = np.flatnonzero((counts > 0) & (self.used == 0))
        self.broken[whole] = False
        self.num_broken -= len(whole)
        self.num_loose += num_pages - len(whole) * self.per_block
        return whole

    def _take_loose(self, num_pages: int) -> Int32:
        """Hand out `num_pages` <= num_loose unowned pages of broken blocks."""
        if not num_pages:
            return np.zeros(0, np.int32)
        partly = np.flatnonzero(self.broken & (self.used < self.per_block))
        order = partly[np.argsort(-self.used[partly], kind="stable")]
        room = np.cumsum(self.per_block - self.used[order])
        order = order[: int(np.searchsorted(room, num_pages)) + 1]
        row, lane = np.nonzero(~self.page_used[order])
        pages = (order[row[:num_pages]] * self.per_block + lane[:num_pages]).astype(np.int32)
        self.page_used.reshape(-1)[pages] = True
        self.used += self._per_block(pages)
        self.num_loose -= num_pages
        return pages

    def _disown(self, pages: Int32, block: Blocks) -> None:
        """Leave `pages`, fewer than all of the one `block` [1], without an owner."""
        self.page_used.reshape(-1)[pages] = False
        self.used[block] -= len(pages)
        self.num_loose += len(pages)

    def _per_block(self, pages: Pages) -> Blocks:
        return np.bincount(pages // self.per_block, minlength=len(self.used))
