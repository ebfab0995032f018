"""GDSF: the block whose loss costs least leaves first: hits since it came times its cost, aged by a clock."""

from array import array
from heapq import heapify, heappop, heappush

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Offers

_STEP = 2048  # blocks of 16 tokens


class GDSF:
    """Greedy dual size frequency (Cherkasova, HP Labs HPL-98-69R1, 1998): priority = clock + frequency * cost / size.

    The clock is the priority of the last victim, so that blocks not hit for long fall behind new ones. All blocks of a
    tier count as one size. The cost is what it takes to compute a block again once those before it are there: the
    weights cost the same at every depth, attention grows with it. For Llama-3.1-8B both cost the same 28,000 tokens
    deep (15e9 against 524,288 * depth operations a token), so the cost is ``1 + depth // 2048``: one more for each
    32,768 tokens in blocks of 16. In whole steps, because a block is worth nothing without those before it: if every
    block cost a little more than its parent, parents would leave first.

    The order of leaving is a heap with one entry an offer; entries that are no longer true are skipped when they come
    up and swept when they are half of it. So a call costs O(log blocks) a block, and the heap is the one thing here
    that keeps an object a block.
    """

    name = "gdsf"
    newest_last = False

    def __init__(self, num_blocks: int) -> None:
        self._offers = Offers(num_blocks)
        self._frequency = array("q", bytes(8 * num_blocks))
        self._cost = array("q", bytes(8 * num_blocks))
        self._priority = array("q", bytes(8 * num_blocks))
        self._serial = array("q", bytes(8 * num_blocks))
        self._heap: list[tuple[int, int, int]] = []  # priority, serial number of the offer, block
        self._num_offers = 0
        self._clock = 0

    def __len__(self) -> int:
        return self._offers.count

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Coming counts as the first use."""
        for block, depth in zip(blocks.tolist(), depths.tolist(), strict=True):
            self._frequency[block] = 1
            self._cost[block] = 1 + depth // _STEP
            self._priority[block] = self._clock + self._cost[block]

    def touch(self, blocks: Blocks) -> None:
        """One more use of each of `blocks`, ranked by the clock of now."""
        for block in blocks.tolist():
            self._frequency[block] += 1
            self._priority[block] = self._clock + self._frequency[block] * self._cost[block]

    def hold(self, blocks: Blocks) -> None:
        """Their entries in the heap are no longer true."""
        for block in blocks.tolist():
            self._offers.discard(block)

    def offer(self, blocks: Blocks) -> None:
        """File `blocks` by their priorities; among equals the first offered leaves first."""
        for block in blocks.tolist():
            self._offers.add(block)
            self._num_offers += 1
            self._serial[block] = self._num_offers
            heappush(self._heap, (self._priority[block], self._num_offers, block))
        if len(self._heap) > 2 * self._offers.count + 64:
            self._heap = [entry for entry in self._heap if self._is_true(entry)]
            heapify(self._heap)

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`."""
        self.hold(blocks)

    def victims(self, count: int) -> Blocks:
        """Take the lowest priorities; the clock moves on to the last of them."""
        gone: list[int] = []
        while len(gone) < count and self._offers.count:
            entry = heappop(self._heap)
            if self._is_true(entry):
                self._clock, _, block = entry
                self._offers.discard(block)
                gone.append(block)
        return np.array(gone, np.int64)

    def _is_true(self, entry: tuple[int, int, int]) -> bool:
        _, serial, block = entry
        return block in self._offers and self._serial[block] == serial
