"""S3-FIFO: a small queue on probation, a main queue for what was hit twice, and a memory of what left the small one."""

from array import array

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Ghosts, Offers, Queues

_SMALL, _MAIN = 0, 1
_MOST_HITS = 3  # two bits
_SMALL_PART = 10  # the small queue holds a tenth


class S3FIFO:
    """S3-FIFO (Yang et al., SOSP'23, algorithm 1): three static FIFO queues.

    New blocks enter the small queue (a tenth of the tier); at its old end those with more than one hit move to the main
    queue, their counters cleared, and the others leave as ghosts. A block whose ghost is known enters the main queue at
    once. There a block with hits left pays one for another round. Counters have two bits; there are as many ghosts as
    main blocks (nine tenths of the tier). The size of the tier is the most it ever held: that is right where bytes, not
    blocks, are the limit. A held block that is met falls out of its queue and joins it at the new end when offered
    again.
    """

    name = "s3fifo"
    newest_last = False

    def __init__(self, num_blocks: int) -> None:
        self._queues = Queues(num_blocks, 2)
        self._offers = Offers(num_blocks)
        self._home = bytearray(num_blocks)
        self._hits = bytearray(num_blocks)
        self._tag = array("Q", bytes(8 * num_blocks))
        self._ghosts = Ghosts()
        self._num_resident = 0
        self._capacity = 0

    def __len__(self) -> int:
        return self._offers.count

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Queue `blocks` up: content that is remembered in the main queue, other content in the small one."""
        for block, tag in zip(blocks.tolist(), tags.tolist(), strict=True):
            self._tag[block] = tag
            self._hits[block] = 0
            self._home[block] = _MAIN if self._ghosts.forget(tag) else _SMALL
            self._queues.append(block, self._home[block])
        self._num_resident += len(blocks)
        self._capacity = max(self._capacity, self._num_resident)

    def touch(self, blocks: Blocks) -> None:
        """Count a hit of each of `blocks`, up to three."""
        for block in blocks.tolist():
            self._hits[block] = min(self._hits[block] + 1, _MOST_HITS)

    def hold(self, blocks: Blocks) -> None:
        """`blocks` keep their places until their turn comes."""
        for block in blocks.tolist():
            self._offers.discard(block)

    def offer(self, blocks: Blocks) -> None:
        """Those of `blocks` that fell out of their queue join it at the new end."""
        for block in blocks.tolist():
            self._offers.add(block)
            if block not in self._queues:
                self._queues.append(block, self._home[block])

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`; they leave no ghosts."""
        for block in blocks.tolist():
            self._offers.discard(block)
            self._queues.discard(block)
        self._num_resident -= len(blocks)

    def victims(self, count: int) -> Blocks:
        """Take from the small queue while it has its tenth, else from the main one."""
        gone: list[int] = []
        while len(gone) < count and self._offers.count:
            small, main = self._queues.length
            from_small = small > 0 and (small * _SMALL_PART >= self._capacity or main == 0)
            block = self._leave_small() if from_small else self._leave_main()
            if block is not None:
                self._offers.discard(block)
                gone.append(block)
        self._num_resident -= len(gone)
        self._ghosts.trim(self._capacity - self._capacity // _SMALL_PART)
        return np.array(gone, np.int64)

    def _leave_small(self) -> int | None:
        """The first block of the small queue with at most one hit; None if all moved to the main queue."""
        while (block := self._next(_SMALL)) is not None:
            if self._hits[block] <= 1:
                self._ghosts.add(self._tag[block])
                return block
            self._hits[block] = 0
            self._home[block] = _MAIN
            self._queues.append(block, _MAIN)
        return None

    def _leave_main(self) -> int | None:
        """The first block of the main queue without a hit left; None if none is offered there."""
        while (block := self._next(_MAIN)) is not None:
            if not self._hits[block]:
                return block
            self._hits[block] -= 1
            self._queues.append(block, _MAIN)
        return None

    def _next(self, queue: int) -> int | None:
        """Take the oldest offered block out of `queue`; held ones before it fall out."""
        while (block := self._queues.oldest(queue)) is not None:
            self._queues.discard(block)
            if block in self._offers:
                return block
        return None
