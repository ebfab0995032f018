"""LFU: the block with the fewest hits since it came leaves first; among equals, the least recent one."""

from array import array
from heapq import heappop, heappush

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Queues


class LFU:
    """Least frequently used, counted while resident (in-cache LFU: a block that returns starts at 1 again).

    Blocks of one frequency form a queue in the order of their offers, as the frequency list of Shah, Mitra and Matani
    ("An O(1) algorithm for implementing the LFU cache eviction scheme", 2010) does; a heap of the frequencies in use,
    far fewer than blocks, finds the lowest.
    """

    name = "lfu"
    newest_last = False

    def __init__(self, num_blocks: int) -> None:
        self._frequency = array("q", bytes(8 * num_blocks))
        self._queues = Queues(num_blocks, 0)
        self._queue_of: dict[int, int] = {}  # frequency -> its queue; its keys are what is in the heap
        self._spare: list[int] = []
        self._heap: list[int] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Coming counts as the first use."""
        for block in blocks.tolist():
            self._frequency[block] = 1

    def touch(self, blocks: Blocks) -> None:
        """One more use of each of `blocks`, which are in no queue while they are held."""
        for block in blocks.tolist():
            self._frequency[block] += 1

    def hold(self, blocks: Blocks) -> None:
        """Take `blocks` out of their queues."""
        for block in blocks.tolist():
            self._queues.discard(block)
        self._size -= len(blocks)

    def offer(self, blocks: Blocks) -> None:
        """Queue each of `blocks` up behind those of its frequency."""
        for block in blocks.tolist():
            self._queues.append(block, self._queue_for(self._frequency[block]))
        self._size += len(blocks)

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`."""
        for block in blocks.tolist():
            self._size -= block in self._queues
            self._queues.discard(block)

    def victims(self, count: int) -> Blocks:
        """Take the oldest offer of the lowest frequency, again and again."""
        gone: list[int] = []
        while len(gone) < count and self._heap:
            block = self._queues.oldest(self._queue_of[self._heap[0]])
            if block is None:
                self._spare.append(self._queue_of.pop(heappop(self._heap)))
            else:
                self._queues.discard(block)
                gone.append(block)
        self._size -= len(gone)
        return np.array(gone, np.int64)

    def _queue_for(self, frequency: int) -> int:
        queue = self._queue_of.get(frequency)
        if queue is None:
            queue = self._spare.pop() if self._spare else self._queues.add_queue()
            self._queue_of[frequency] = queue
            heappush(self._heap, frequency)
        return queue
