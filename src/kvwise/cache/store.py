"""The store: what each block holds, who may take it, and how it changes between free, referenced and idle."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvwise.cache.events import AllBlocksCleared, BlocksRemoved, BlocksStored, EventLog
from kvwise.cache.lifecycle import Lifecycle
from kvwise.cache.misses import Ledger, RemovalReason
from kvwise.cache.pool import BlockPool
from kvwise.cache.prefix import PrefixIndex
from kvwise.core.clock import Clock
from kvwise.policies.base import Blocks, ReplacementPolicy


class Publication(NamedTuple):
    """Full blocks of any number of chains: `blocks[i]` holds `keys[i]`, whose parent is `parents[i]`.

    `depths` [n] are indices in their chains, `expires_at` [n] seconds or infinity; `probes[i]` matters at
    depth 0.
    """

    keys: list[bytes]
    parents: list[bytes]
    blocks: Blocks
    depths: Blocks
    expires_at: npt.NDArray[np.float64]
    probes: dict[int, bytes]


class BlockStore:
    """Pool, prefix index, policy and deadlines, kept in step; blocks leave only through here."""

    def __init__(self, pool: BlockPool, policy: ReplacementPolicy, clock: Clock, max_events: int) -> None:
        self.pool = pool
        self.policy = policy
        self.clock = clock
        self.index = PrefixIndex(pool.num_blocks)
        self.lifecycle = Lifecycle(pool.num_blocks)
        self.ledger = Ledger(capacity=max(4 * pool.num_blocks, 1024))
        self.events = EventLog(max_events)
        self.num_idle = 0
        self.num_evicted = 0

    @property
    def num_available(self) -> int:
        """Whole blocks that can be handed out now: free ones and those that may be evicted."""
        return self.pool.num_free + len(self.policy)

    def take(self, count: int) -> Blocks:
        """Hand out `count` <= num_available blocks: free ones first, evicting for the rest."""
        if count > self.pool.num_free:
            self.sweep(self.clock.now())
        short = count - self.pool.num_free
        if short > 0:
            victims = self.policy.victims(short)
            self.num_evicted += len(victims)
            self._unpublish(victims, RemovalReason.EVICTED)
        return self.pool.pop(count)

    def retain(self, blocks: Blocks) -> None:
        """A new request hit the published `blocks`: one more reference each."""
        idle = blocks[self.pool.refs[blocks] == 0]
        self.num_idle -= len(idle)
        self.policy.hold(idle[~self.lifecycle.pinned[idle]])
        self.pool.refs[blocks] += 1
        self.policy.touch(blocks)

    def let_go(self, blocks: Blocks) -> None:
        """Drop one reference of each block; the last one makes it idle if it is published, else free."""
        gone = self.pool.drop(blocks)
        published = self.index.keyed[gone]
        idle = gone[published]
        self.num_idle += len(idle)
        self.policy.offer(idle[~self.lifecycle.pinned[idle]])
        self.pool.push(gone[~published])

    def publish(self, new: Publication) -> None:
        """Make blocks matchable whose bytes are written; a key that is taken leaves its block private."""
        now = self.clock.now()
        self.sweep(now)
        keys, parents, blocks, depths, expires_at, probes = new
        ids = blocks.tolist()
        added = self.index.add(keys, ids)
        for block in probes.keys() & (ids[i] for i in added):
            self.index.add_probe(block, probes[block])
        if len(added) < len(keys):
            keys, parents, ids = ([column[i] for i in added] for column in (keys, parents, ids))
            blocks, depths, expires_at = blocks[added], depths[added], expires_at[added]
        if not keys:
            return
        self.index.keyed[blocks] = True
        if expires_at.min() < np.inf:
            self.lifecycle.set_expiry(blocks, expires_at)
        self.policy.insert(blocks, np.frombuffer(b"".join(keys), np.uint64)[::4], depths)
        self.events.append(BlocksStored(now, tuple(keys), tuple(parents), tuple(ids)))

    def withdraw(self, blocks: Blocks, reason: RemovalReason) -> None:
        """Make published `blocks` unfindable; idle ones become free, referenced ones private."""
        if len(blocks):
            self.policy.remove(blocks)
            self._unpublish(blocks, reason)

    def pin(self, blocks: Blocks, until: float) -> None:
        """Protect published `blocks` from eviction until `until` seconds."""
        fresh = self.lifecycle.pin(blocks, until)
        self.policy.hold(fresh[self.pool.refs[fresh] == 0])

    def unpin(self, blocks: Blocks) -> int:
        """End the pins of `blocks`; idle ones may be evicted, deepest first. Number of pins ended."""
        had = self.lifecycle.unpin(blocks)[::-1]
        self.policy.offer(had[self.pool.refs[had] == 0])
        return len(had)

    def sweep(self, now: float) -> int:
        """Carry out what is due at `now`: expired blocks leave, pins end. Number expired; O(1) if none."""
        if now < self.lifecycle.soonest:
            return 0
        expired, unpinned = self.lifecycle.due(now)
        self.withdraw(expired, RemovalReason.EXPIRED)
        self.unpin(unpinned)
        self.lifecycle.find_soonest()
        return len(expired)

    def clear(self) -> int:
        """Empty the index; idle blocks become free. Returns the number of blocks that were published."""
        blocks = np.flatnonzero(self.index.keyed)
        self.withdraw(blocks, RemovalReason.CLEARED)
        self.events.append(AllBlocksCleared(self.clock.now()))
        return len(blocks)

    def _unpublish(self, blocks: Blocks, reason: RemovalReason) -> None:
        idle = blocks[self.pool.refs[blocks] == 0]
        ids = blocks.tolist()
        keys = self.index.discard(ids)
        self.lifecycle.forget(blocks)
        self.num_idle -= len(idle)
        self.pool.push(idle)
        now = self.clock.now()
        self.ledger.note(keys, reason, now)
        self.events.append(BlocksRemoved(now, tuple(keys), tuple(ids), reason))
