"""LRU: the block whose last reference went longest ago leaves first."""

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks, Tags


class LRU:
    """Least recently used, the order of vLLM's free queue (its docs/design/prefix_caching.md).

    Recency is a log of block ids, oldest first. Offering appends; holding only unmarks the entry, and whoever
    walks the log skips what is unmarked. So every call is a few numpy operations whatever the number of
    blocks, where a linked list would follow one pointer per block. The log has room for twice the blocks, so
    packing it is amortised.
    """

    name = "lru"
    newest_last = True

    def __init__(self, num_blocks: int) -> None:
        self._log: Blocks = np.zeros(2 * num_blocks + 1, np.int64)
        self._place: npt.NDArray[np.int64] = np.zeros(num_blocks, np.int64)
        self._offered: npt.NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self._head = 0
        self._tail = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Nothing to note: order is set when a block is offered."""

    def touch(self, blocks: Blocks) -> None:
        """Nothing to note: a hit block is offered anew when its last reference goes."""

    def hold(self, blocks: Blocks) -> None:
        """Unmark the log entries of `blocks`."""
        self._offered[blocks] = False
        self._size -= len(blocks)

    def offer(self, blocks: Blocks) -> None:
        """Append `blocks` as the most recent ones; the first named is the oldest among them."""
        if self._tail + len(blocks) > len(self._log):
            self._pack()
        end = self._tail + len(blocks)
        self._log[self._tail : end] = blocks
        self._place[blocks] = np.arange(self._tail, end)
        self._offered[blocks] = True
        self._tail = end
        self._size += len(blocks)

    def remove(self, blocks: Blocks) -> None:
        """Unmark the log entries of those of `blocks` that are offered."""
        self._size -= int(np.count_nonzero(self._offered[blocks]))
        self._offered[blocks] = False

    def victims(self, count: int) -> Blocks:
        """Take up to `count` marked entries from the old end of the log."""
        taken: list[Blocks] = []
        missing = min(count, self._size)
        while missing:
            stop = min(self._head + 2 * missing + 64, self._tail)
            live = self._live(self._head, stop)[:missing]
            taken.append(self._log[live])
            self._offered[taken[-1]] = False
            self._size -= len(live)
            missing -= len(live)
            self._head = stop if missing else int(live[-1]) + 1
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _live(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Log places in [start, stop) whose entry is marked and is the block's latest."""
        blocks = self._log[start:stop]
        places = np.arange(start, stop)
        live: npt.NDArray[np.int64] = places[self._offered[blocks] & (self._place[blocks] == places)]
        return live

    def _pack(self) -> None:
        blocks = self._log[self._live(self._head, self._tail)]
        self._log[: len(blocks)] = blocks
        self._place[blocks] = np.arange(len(blocks))
        self._head, self._tail = 0, len(blocks)
