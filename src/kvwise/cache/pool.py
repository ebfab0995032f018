"""The block pool: who is free, how often each block is referenced, and which blocks are broken into pages."""

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks

Int32 = npt.NDArray[np.int32]
Pages = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class BlockPool:
    """Arrays over all blocks and pages; page p belongs to block p // pages_per_block.

    Every block is exactly one of

    * *free*: in the ring, handed out first in, first out;
    * *referenced*: `refs > 0`, held by that many sequences;
    * *idle*: `refs == 0` but published, so a later request may hit it;
    * *broken*: handed out page by page; `used[b]` of its pages have an owner (at least one, else it is made
      whole).

    Methods trust their caller (the manager, which `check` proves); they validate nothing.
    """

    def __init__(self, num_blocks: int, pages_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.pages_per_block = pages_per_block
        self.refs: Int32 = np.zeros(num_blocks, np.int32)
        self.broken: Bools = np.zeros(num_blocks, np.bool_)
        self.used: Int32 = np.zeros(num_blocks, np.int32)
        self.page_used: Bools = np.zeros((num_blocks, pages_per_block), np.bool_)
        self.num_free = num_blocks
        self.num_broken = 0
        self.num_loose = 0  # unowned pages of broken blocks
        self._ring: Blocks = np.arange(num_blocks)
        self._head = 0
        self._lanes = np.arange(pages_per_block)

    def free_blocks(self) -> Blocks:
        """The free blocks, next to be handed out first."""
        return self._ring.take(np.arange(self._head, self._head + self.num_free), mode="wrap")

    def pop(self, count: int) -> Blocks:
        """Take `count` free blocks out of the ring."""
        end = self._head + count
        if end <= self.num_blocks:
            blocks = self._ring[self._head : end].copy()
        else:
            blocks = self._ring.take(np.arange(self._head, end), mode="wrap")
        self._head = end % self.num_blocks
        self.num_free -= count
        return blocks

    def push(self, blocks: Blocks) -> None:
        """Put `blocks` at the end of the ring."""
        tail = (self._head + self.num_free) % self.num_blocks
        first = min(len(blocks), self.num_blocks - tail)
        self._ring[tail : tail + first] = blocks[:first]
        self._ring[: len(blocks) - first] = blocks[first:]
        self.num_free += len(blocks)

    def drop(self, blocks: Blocks) -> Blocks:
        """Drop one reference of each block; return those without any, last named first (deepest first)."""
        left = self.refs[blocks] - 1
        self.refs[blocks] = left
        gone: Blocks = blocks[left == 0][::-1]
        return gone

    def pages_of(self, blocks: Blocks) -> Blocks:
        """All page ids of `blocks`, [n, pages_per_block]."""
        return blocks[:, None] * self.pages_per_block + self._lanes

    def break_owned(self, blocks: Blocks) -> None:
        """Turn blocks that one sequence holds alone into broken ones all of whose pages it owns."""
        self.refs[blocks] = 0
        self.broken[blocks] = True
        self.used[blocks] = self.pages_per_block
        self.page_used[blocks] = True
        self.num_broken += len(blocks)

    def blocks_to_break(self, num_pages: int) -> int:
        """Whole blocks that must be broken to hand out `num_pages` pages."""
        return -(-max(num_pages - self.num_loose, 0) // self.pages_per_block)

    def take_pages(self, num_pages: int, fresh: Blocks) -> Blocks:
        """Hand out `num_pages` pages: of the fullest broken blocks first, then of the blocks `fresh`.

        Filling the fullest first lets the others run empty and become whole again. `fresh` must be exactly as
        many as `blocks_to_break` says.
        """
        self.broken[fresh] = True
        self.num_broken += len(fresh)
        self.num_loose += len(fresh) * self.pages_per_block
        open_blocks = np.flatnonzero(self.broken & (self.used < self.pages_per_block))
        order = open_blocks[np.argsort(-self.used[open_blocks], kind="stable")]
        room = np.cumsum(self.pages_per_block - self.used[order])
        order = order[: int(np.searchsorted(room, num_pages)) + 1]
        row, lane = np.nonzero(~self.page_used[order])
        pages = order[row[:num_pages]] * self.pages_per_block + lane[:num_pages]
        self.page_used.reshape(-1)[pages] = True
        self.used += self._per_block(pages)
        self.num_loose -= len(pages)
        return pages

    def free_pages(self, pages: Pages) -> None:
        """Give pages back; a broken block without owned pages becomes a free whole block."""
        self.page_used.reshape(-1)[pages] = False
        counts = self._per_block(pages)
        self.used -= counts
        whole = np.flatnonzero((counts > 0) & (self.used == 0))
        self.broken[whole] = False
        self.num_broken -= len(whole)
        self.num_loose += len(pages) - len(whole) * self.pages_per_block
        self.push(whole)

    def _per_block(self, pages: Pages) -> Blocks:
        return np.bincount(pages // self.pages_per_block, minlength=self.num_blocks)
