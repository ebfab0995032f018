"""When blocks expire and which are pinned: deadlines in seconds on the injected clock."""

import numpy as np
import numpy.typing as npt

from kvwise.cache.deadlines import Deadlines, Expiry
from kvwise.policies.base import Blocks


class Lifecycle:
    """Deadlines of published blocks; infinity is "never".

    Expiry is a promise about data, so it ends a pin; a pin only protects from eviction. A block expires at the end it
    was published with, or when nobody hit it for its idle time, whichever comes first: `expiry.at` is that moment.
    """

    def __init__(self, num_blocks: int) -> None:
        self.expiry = Expiry(num_blocks)
        self.pins = Deadlines(num_blocks)
        self.pinned: npt.NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.num_pinned = 0

    @property
    def soonest(self) -> float:
        """A lower bound of the next deadline of either kind: nothing is due before."""
        return min(self.expiry.soonest, self.pins.soonest)

    def pin(self, blocks: Blocks, until: float) -> Blocks:
        """Pin `blocks`; of two pins the later deadline holds. Returns those that were not pinned before."""
        again = self.pinned[blocks]
        at = np.full(len(blocks), until)
        at[again] = np.maximum(until, self.pins.at[blocks[again]])
        self.pins.set(blocks, at)
        self.pinned[blocks] = True
        fresh: Blocks = blocks[~again]
        self.num_pinned += len(fresh)
        return fresh

    def unpin(self, blocks: Blocks) -> Blocks:
        """Take the pins of `blocks` away; returns those that had one."""
        had = blocks[self.pinned[blocks]]
        self.pinned[had] = False
        self.pins.clear(had)
        self.num_pinned -= len(had)
        return had

    def forget(self, blocks: Blocks) -> None:
        """`blocks` are no longer published: no expiry, no pin."""
        self.expiry.clear(blocks)
        if self.num_pinned:
            self.unpin(blocks)
