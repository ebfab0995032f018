"""SIEVE: a hand walks from old to new, spares once what was hit since it last passed, and evicts what was not."""

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Offers, Queues


class Sieve:
    """SIEVE (Zhang et al., NSDI'24, algorithm 1): a FIFO queue, a bit a block, and a hand that stays where it evicted.

    New blocks join at the new end, spared ones keep their places, so the hand sifts new blocks quickly and leaves
    popular ones alone. A held block that the hand meets falls out of the queue and joins it at the new end when it is
    offered again: so no walk passes the same held block twice.
    """

    name = "sieve"
    newest_last = False

    def __init__(self, num_blocks: int) -> None:
        self._queue = Queues(num_blocks, 1)
        self._offers = Offers(num_blocks)
        self._visited = bytearray(num_blocks)
        self._hand: int | None = None  # None: the next walk starts at the oldest

    def __len__(self) -> int:
        return self._offers.count

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Queue `blocks` up, not visited; the first named is the oldest among them."""
        for block in blocks.tolist():
            self._visited[block] = 0
            self._queue.append(block, 0)

    def touch(self, blocks: Blocks) -> None:
        """Mark `blocks` as visited."""
        for block in blocks.tolist():
            self._visited[block] = 1

    def hold(self, blocks: Blocks) -> None:
        """`blocks` keep their places until the hand meets them."""
        for block in blocks.tolist():
            self._offers.discard(block)

    def offer(self, blocks: Blocks) -> None:
        """Those of `blocks` that fell out of the queue join it at the new end."""
        for block in blocks.tolist():
            self._offers.add(block)
            if block not in self._queue:
                self._queue.append(block, 0)

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`; the hand moves on if it points at one."""
        for block in blocks.tolist():
            self._offers.discard(block)
            self._drop(block)

    def victims(self, count: int) -> Blocks:
        """Walk on until `count` blocks that were not visited have been met, clearing the marks of the others."""
        gone: list[int] = []
        while len(gone) < count and self._offers.count:
            block = self._queue.oldest(0) if self._hand is None else self._hand
            assert block is not None  # every offered block is queued
            self._hand = block
            if block not in self._offers:
                self._drop(block)
            elif self._visited[block]:
                self._visited[block] = 0
                self._hand = self._queue.newer(block)
            else:
                self._drop(block)
                self._offers.discard(block)
                gone.append(block)
        return np.array(gone, np.int64)

    def _drop(self, block: int) -> None:
        if block == self._hand:
            self._hand = self._queue.newer(block)
        self._queue.discard(block)
