"""ARC: room shifts between blocks used once and blocks used again, towards the side whose ghosts return."""

from array import array

import numpy as np

from kvwise.policies.base import Blocks, Tags
from kvwise.policies.queues import Ghosts, Queues

_ONCE, _AGAIN = 0, 1


class ARC:
    """Adaptive replacement cache (Megiddo and Modha, FAST'03, figure 4): lists T1, T2 and their ghosts B1, B2.

    T1 holds blocks seen once, T2 blocks seen again, both in the order of their last offers; `target` (the paper's p)
    is the part of the room meant for T1. Ghosts are tags: |T1| + |B1| <= c and all four <= 2c, where c is the most
    blocks the tier ever held. One difference: the seam names victims before it names the newcomer, so a ghost that
    returns moves the target for the next victim and not for the one that made room for itself.
    """

    name = "arc"
    newest_last = False

    def __init__(self, num_blocks: int) -> None:
        self._queues = Queues(num_blocks, 2)  # the offered blocks of T1 and T2
        self._home = bytearray(num_blocks)
        self._tag = array("Q", bytes(8 * num_blocks))
        self._ghosts = (Ghosts(), Ghosts())
        self._num_resident = [0, 0]  # with the held ones
        self._capacity = 0
        self._target = 0.0

    def __len__(self) -> int:
        return sum(self._queues.length)

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """Content that is remembered joins T2 and moves the target; other content joins T1."""
        for block, tag in zip(blocks.tolist(), tags.tolist(), strict=True):
            self._tag[block] = tag
            self._home[block] = _AGAIN if self._returns(tag) else _ONCE
            self._num_resident[self._home[block]] += 1
            self._trim()

    def touch(self, blocks: Blocks) -> None:
        """`blocks` are seen again: they belong to T2."""
        for block in blocks.tolist():
            self._num_resident[self._home[block]] -= 1
            self._num_resident[_AGAIN] += 1
            self._home[block] = _AGAIN

    def hold(self, blocks: Blocks) -> None:
        """Take `blocks` out of the order."""
        for block in blocks.tolist():
            self._queues.discard(block)

    def offer(self, blocks: Blocks) -> None:
        """`blocks` are the most recent of their lists; the first named is the oldest among them."""
        for block in blocks.tolist():
            self._queues.append(block, self._home[block])

    def remove(self, blocks: Blocks) -> None:
        """Forget `blocks`; they leave no ghosts."""
        for block in blocks.tolist():
            self._queues.discard(block)
            self._num_resident[self._home[block]] -= 1

    def victims(self, count: int) -> Blocks:
        """Take the oldest of T1 while it is above its target, else the oldest of T2."""
        gone: list[int] = []
        while len(gone) < count and len(self):
            above = self._num_resident[_ONCE] > self._target
            wanted, other = (_ONCE, _AGAIN) if above else (_AGAIN, _ONCE)
            side = wanted if self._queues.length[wanted] else other
            block = self._queues.oldest(side)
            assert block is not None  # one of the two has an offered block
            self._queues.discard(block)
            self._num_resident[side] -= 1
            self._ghosts[side].add(self._tag[block])
            gone.append(block)
        return np.array(gone, np.int64)

    def _returns(self, tag: int) -> bool:
        """Whether `tag` is a ghost; it is none any longer, and the target moves towards its side."""
        once, again = map(len, self._ghosts)
        if self._ghosts[_ONCE].forget(tag):
            self._target = min(self._target + max(again / once, 1), self._capacity)
            return True
        if self._ghosts[_AGAIN].forget(tag):
            self._target = max(self._target - max(once / again, 1), 0)
            return True
        return False

    def _trim(self) -> None:
        num_resident = sum(self._num_resident)
        self._capacity = max(self._capacity, num_resident)
        once, again = self._ghosts
        once.trim(self._capacity - self._num_resident[_ONCE])
        again.trim(2 * self._capacity - num_resident - len(once))
