"""FIFO: the block that was inserted first leaves first, however often it was hit."""

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Offers, Queues


class FIFO:
    """First in, first out: the baseline that looks at no hit (Belady, IBM Systems Journal 5(2), 1966).

    A block whose turn comes while it is held falls out of the queue, and joins it at the new end when it is offered
    again: so no walk passes the same held block twice.
    """

    name = "fifo"
    newest_last = True

    def __init__(self, num_blocks: int) -> None:
        self._queue = Queues(num_blocks, 1)
        self._offers = Offers(num_blocks)

    def __len__(self) -> int:
        return self._offers.count

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Queue `blocks` up; the first named is the oldest among them."""
        for block in blocks.tolist():
            self._queue.append(block, 0)

    def touch(self, blocks: Blocks) -> None:
        """Nothing to note: a hit changes no order here."""

    def hold(self, blocks: Blocks) -> None:
        """`blocks` keep their places until their turn comes."""
        for block in blocks.tolist():
            self._offers.discard(block)

    def offer(self, blocks: Blocks) -> None:
        """Those of `blocks` that fell out of the queue join it at the new end."""
        for block in blocks.tolist():
            self._offers.add(block)
            if block not in self._queue:
                self._queue.append(block, 0)

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`."""
        for block in blocks.tolist():
            self._offers.discard(block)
            self._queue.discard(block)

    def victims(self, count: int) -> Blocks:
        """Take blocks from the old end; held ones that are met there fall out."""
        gone: list[int] = []
        while len(gone) < count and self._offers.count:
            block = self._queue.oldest(0)
            assert block is not None  # every offered block is queued
            self._queue.discard(block)
            if block in self._offers:
                self._offers.discard(block)
                gone.append(block)
        return np.array(gone, np.int64)
