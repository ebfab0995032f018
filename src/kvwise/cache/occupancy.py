"""What holds each block of the pool, for whoever draws it."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvwise.cache.store import BlockStore


class Holder(IntEnum):
    """What a block is held by. Where several hold, the last named is told."""

    FREE = 0
    CACHED = 1  # by nobody: a later request may find it, and it leaves when room is needed
    EXPIRING = 2  # likewise, and its time to live is over soon
    PINNED = 3  # likewise, and it may not leave
    RUNNING = 4  # by one request
    SHARED = 5  # by several requests, or one and a transfer
    PAGES = 6  # broken into pages of single layers and heads
    PACKED = 7  # broken into pages of codes


def occupancy(store: BlockStore, soon: float) -> npt.NDArray[np.uint8]:
    """Holder of every block, uint8 [num_blocks]; EXPIRING before `soon` seconds on the store's clock."""
    pool, kept = store.pool, store.lifecycle
    held = np.full(pool.num_blocks, Holder.CACHED, np.uint8)
    held[kept.expiry.at <= soon] = Holder.EXPIRING
    held[kept.pinned] = Holder.PINNED
    held[pool.refs == 1] = Holder.RUNNING
    held[pool.refs > 1] = Holder.SHARED
    held[pool.pages.broken] = Holder.PAGES
    held[pool.packed.broken] = Holder.PACKED
    held[pool.free_blocks()] = Holder.FREE
    return held
