"""When blocks expire and which are pinned: arrays of deadlines in seconds on the injected clock."""

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks

Floats = npt.NDArray[np.float64]


class Lifecycle:
    """Deadlines of published blocks; infinity is "never".

    Expiry is absolute and a maximum: it is a promise about data, so it ends a pin, and a hit does not prolong
    it. A pin only protects from eviction. `soonest` is a lower bound of the next deadline, so that asking is
    O(1) while nothing is due.
    """

    def __init__(self, num_blocks: int) -> None:
        self.expires_at: Floats = np.full(num_blocks, np.inf)
        self.pinned: npt.NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.pinned_until: Floats = np.full(num_blocks, np.inf)
        self.num_pinned = 0
        self.soonest = np.inf

    def set_expiry(self, blocks: Blocks, at: Floats) -> None:
        """Let `blocks[i]` expire at `at[i]` seconds."""
        self.expires_at[blocks] = at
        self.soonest = min(self.soonest, float(at.min()))

    def pin(self, blocks: Blocks, until: float) -> Blocks:
        """Pin `blocks`; of two pins the later deadline holds. Returns those that were not pinned before."""
        fresh = blocks[~self.pinned[blocks]]
        self.pinned_until[fresh] = until
        self.pinned_until[blocks] = np.maximum(self.pinned_until[blocks], until)
        self.pinned[blocks] = True
        self.num_pinned += len(fresh)
        self.soonest = min(self.soonest, until)
        return fresh

    def unpin(self, blocks: Blocks) -> Blocks:
        """Take the pins of `blocks` away; returns those that had one."""
        had = blocks[self.pinned[blocks]]
        self.pinned[had] = False
        self.pinned_until[had] = np.inf
        self.num_pinned -= len(had)
        return had

    def forget(self, blocks: Blocks) -> None:
        """`blocks` are no longer published: no expiry, no pin."""
        if self.soonest < np.inf:
            self.expires_at[blocks] = np.inf
        if self.num_pinned:
            self.unpin(blocks)

    def due(self, now: float) -> tuple[Blocks, Blocks]:
        """(expired blocks, blocks whose pin ended) at `now`; either may be empty."""
        expired = np.flatnonzero(self.expires_at <= now)
        unpinned = np.flatnonzero(self.pinned & (self.pinned_until <= now))
        return expired, unpinned

    def find_soonest(self) -> None:
        """Tighten `soonest` to the true next deadline."""
        self.soonest = float(min(self.expires_at.min(initial=np.inf), self.pinned_until.min(initial=np.inf)))
