"""The block pool: who is free, how often each block is referenced, and which blocks are broken into pages."""

import numpy as np

from kvwise.cache.lanes import Int32, Lanes, Pages
from kvwise.policies.base import Blocks


class BlockPool:
    """Arrays over all blocks, and two sizes of pages a block can be broken into.

    Every block is exactly one of

    * *free*: in the ring, handed out first in, first out;
    * *referenced*: `refs > 0`, held by that many sequences;
    * *idle*: `refs == 0` but published, so a later request may hit it;
    * *broken*: handed out page by page, by `pages` (one layer's and head's part of a block, in the cache's own dtype)
      or by `packed` (smaller ones, that hold tokens in codes). Never by both at once.

    Methods trust their caller (the manager, which `check` proves); they validate nothing.
    """

    def __init__(self, num_blocks: int, pages_per_block: int, packed_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.refs: Int32 = np.zeros(num_blocks, np.int32)
        self.pages = Lanes(num_blocks, pages_per_block)
        self.packed = Lanes(num_blocks, packed_per_block)
        self.num_free = num_blocks
        self._ring: Blocks = np.arange(num_blocks)
        self._head = 0

    @property
    def num_broken(self) -> int:
        """Blocks that are broken into pages of either size."""
        return self.pages.num_broken + self.packed.num_broken

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

    def break_owned(self, blocks: Blocks) -> None:
        """Turn blocks that one sequence holds alone into broken ones all of whose `pages` it owns."""
        self.refs[blocks] = 0
        self.pages.break_owned(blocks)

    def free_pages(self, lanes: Lanes, pages: Pages) -> None:
        """Give back pages of either size; a broken block without owned pages becomes a free whole block."""
        self.push(lanes.free(pages))
