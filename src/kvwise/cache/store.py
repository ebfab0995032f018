"""The store: what each block holds, who may take it, and how it changes between free, referenced and idle."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvwise.cache.ages import BlockAges
from kvwise.cache.deadlines import Floats
from kvwise.cache.events import AllBlocksCleared, BlocksRemoved, BlocksStored, EventLog
from kvwise.cache.lanes import Int32, Lanes
from kvwise.cache.lifecycle import Lifecycle
from kvwise.cache.misses import Ledger, RemovalReason
from kvwise.cache.pool import BlockPool
from kvwise.cache.prefix import PrefixIndex
from kvwise.cache.quotas import Quotas
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.cache.values import Withdrawn
from kvwise.core.clock import Clock
from kvwise.core.errors import InvariantError
from kvwise.policies.base import Blocks, ReplacementPolicy


class Publication(NamedTuple):
    """Full blocks of any number of chains: `blocks[i]` holds `keys[i]`, whose parent is `parents[i]`.

    `depths` [n] are indices in their chains, `probes` block -> probe at depth 0, `dates` float64 [2, n] when they
    expire and their idle times in seconds (None: nothing expires), `terms[i]` what their sequences are kept under.
    """

    keys: list[bytes]
    parents: list[bytes]
    blocks: Blocks
    depths: Blocks
    probes: dict[int, bytes]
    dates: Floats | None
    terms: list[Terms]

    def only(self, places: Sequence[int]) -> "Publication":
        """The part at these indices."""
        return Publication(
            [self.keys[i] for i in places],
            [self.parents[i] for i in places],
            self.blocks[places],
            self.depths[places],
            self.probes,
            None if self.dates is None else self.dates[:, places],
            [self.terms[i] for i in places],
        )


class BlockStore:
    """Pool, prefix index, policy and deadlines, kept in step; blocks leave only through here.

    `held` int32 [num_blocks]: references of transfers under way, which no sequence accounts for. `quotas`: published
    blocks a tenant. `foreign`: bare probes of prompts that lower tiers keep under another identity.
    """

    def __init__(
        self, pool: BlockPool, policy: ReplacementPolicy, clock: Clock, max_event_blocks: int, quotas: Mapping[str, int]
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.clock = clock
        self.index = PrefixIndex(pool.num_blocks)
        self.lifecycle = Lifecycle(pool.num_blocks)
        self.ages = BlockAges(pool.num_blocks)
        self.ledger = Ledger(capacity=max(4 * pool.num_blocks, 1024))
        self.events = EventLog(max_event_blocks)
        self.quotas = Quotas(quotas)
        self.terms: list[Terms] = [NO_LIMIT] * pool.num_blocks  # of published blocks
        self.held: npt.NDArray[np.int32] = np.zeros(pool.num_blocks, np.int32)
        self.foreign: set[bytes] = set()
        self.num_idle = 0
        self.num_held = 0
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

    def has_room(self, lanes: Lanes, num_pages: int) -> bool:
        """Whether `take_pages` can hand out `num_pages` pages."""
        return lanes.blocks_to_break(num_pages) <= self.num_available

    def take_pages(self, lanes: Lanes, num_pages: int) -> Int32:
        """Hand out `num_pages` pages, for which there is room: unowned ones first, breaking blocks for the rest."""
        return lanes.take(num_pages, self.take(lanes.blocks_to_break(num_pages)))

    def retain(self, blocks: Blocks) -> None:
        """A new request hit the published `blocks`: one more reference each."""
        self._refer(blocks)
        self.policy.touch(blocks)
        now = self.clock.now()
        self.lifecycle.expiry.hit(blocks, now)
        self.ages.hit(blocks, now)

    def let_go(self, blocks: Blocks) -> None:
        """A sequence drops its reference of each block; the last one makes it idle if it is published, else free."""
        self.ages.let_go(blocks, self.clock.now())
        self._drop(blocks)

    def _drop(self, blocks: Blocks) -> None:
        gone = self.pool.drop(blocks)
        published = self.index.keyed[gone]
        idle = gone[published]
        self.num_idle += len(idle)
        self._offer(idle[~self.lifecycle.pinned[idle]])
        self.pool.push(gone[~published])

    def hold(self, blocks: Blocks) -> None:
        """A transfer reads or writes `blocks`: one more reference each, dropped by `end_hold`."""
        self._refer(blocks)
        self.num_held += int(np.count_nonzero(self.held[blocks] == 0))
        self.held[blocks] += 1

    def end_hold(self, blocks: Blocks) -> None:
        """Drop the reference that `hold` took; InvariantError if one of `blocks` has none."""
        if (self.held[blocks] < 1).any() or len(np.unique(blocks)) < len(blocks):
            raise InvariantError(f"blocks {blocks.tolist()} are not all held: each hold is let go exactly once")
        self.held[blocks] -= 1
        self.num_held -= int(np.count_nonzero(self.held[blocks] == 0))
        self._drop(blocks)

    def publish(self, new: Publication) -> None:
        """Make blocks matchable whose bytes are written; one whose key is taken, or over its quota, stays private."""
        now = self.clock.now()
        self.sweep(now)
        self.index.end_announcements(new.keys)
        if self.quotas.limits:
            new = new.only(self._make_quota(new))
        ids = new.blocks.tolist()
        added = self.index.add(new.keys, ids)
        for block in new.probes.keys() & (ids[i] for i in added):
            self.index.add_probe(block, new.probes[block])
        if len(added) < len(new.keys):
            new = new.only(added)
        if not new.keys:
            return
        self.index.keyed[new.blocks] = True
        self.ages.publish(new.blocks, now)
        ids = new.blocks.tolist()
        for block, terms in zip(ids, new.terms, strict=True):
            self.terms[block] = terms
            if self.quotas.limits:
                self.quotas.charge(terms.tenant, 1)
        if new.dates is not None:
            self.lifecycle.expiry.date(new.blocks, new.dates[0], new.dates[1], now)
        self.policy.insert(new.blocks, np.frombuffer(b"".join(new.keys), np.uint64)[::4], new.depths)
        self.events.append(BlocksStored(now, tuple(new.keys), tuple(new.parents), tuple(ids)))

    def withdraw(self, blocks: Blocks, reason: RemovalReason) -> None:
        """Make published `blocks` unfindable; idle ones become free, referenced ones private."""
        if len(blocks):
            self.policy.remove(blocks)
            self._unpublish(blocks, reason)

    def withdraw_held(self, blocks: Blocks, reason: RemovalReason) -> Withdrawn:
        """`withdraw`, but those that nobody refers to are held instead of free."""
        idle = blocks[self.pool.refs[blocks] == 0]
        self.hold(idle)
        self.withdraw(blocks, reason)
        return Withdrawn(idle, len(blocks) - len(idle))

    def pin(self, blocks: Blocks, until: float) -> None:
        """Protect published `blocks` from eviction until `until` seconds."""
        fresh = self.lifecycle.pin(blocks, until)
        self._hold_back(fresh[self.pool.refs[fresh] == 0])

    def unpin(self, blocks: Blocks) -> int:
        """End the pins of `blocks`; idle ones may be evicted, deepest first. Number of pins ended."""
        had = self.lifecycle.unpin(blocks)[::-1]
        self._offer(had[self.pool.refs[had] == 0])
        return len(had)

    def sweep(self, now: float) -> int:
        """Carry out what is due at `now`: expired blocks leave, pins end. Number expired; O(1) if none."""
        if now < self.lifecycle.soonest:
            return 0
        expired = self.lifecycle.expiry.take_due(now)
        self.withdraw(expired, RemovalReason.EXPIRED)
        self.unpin(self.lifecycle.pins.take_due(now))
        return len(expired)

    def clear(self) -> int:
        """Empty the index; idle blocks become free. Returns the number of blocks that were published."""
        blocks = np.flatnonzero(self.index.keyed)
        self.withdraw(blocks, RemovalReason.CLEARED)
        self.events.append(AllBlocksCleared(self.clock.now()))
        return len(blocks)

    def _make_quota(self, new: Publication) -> list[int]:
        """Which of `new` their tenants' quotas admit, first to last; own idle blocks leave for them.

        A key that is taken now is left out, so that it does not come back uncounted if its block is one that leaves.
        """
        room = {tenant: self.quotas.room(tenant) for tenant in self.quotas.limits}
        wanted: dict[bytes, str] = {}
        places = []
        for i, (key, block, terms) in enumerate(zip(new.keys, new.blocks.tolist(), new.terms, strict=True)):
            taken = key in wanted or self.index.find(key) is not None or self.index.key(block) is not None
            if not taken and room.setdefault(terms.tenant, inf) >= 1:
                room[terms.tenant] -= 1
                wanted[key] = terms.tenant
                places.append(i)
        for tenant, count in Counter(wanted.values()).items():
            victims = np.array(self.quotas.victims(tenant, count), np.int64)
            self.num_evicted += len(victims)
            self.withdraw(victims, RemovalReason.EVICTED)
        return places

    def _refer(self, blocks: Blocks) -> None:
        idle = blocks[self.pool.refs[blocks] == 0]
        self.num_idle -= len(idle)
        self._hold_back(idle[~self.lifecycle.pinned[idle]])
        self.pool.refs[blocks] += 1

    def _offer(self, blocks: Blocks) -> None:
        self.policy.offer(blocks)
        if self.quotas.limits:
            self.quotas.offer(self._owned(blocks))

    def _hold_back(self, blocks: Blocks) -> None:
        self.policy.hold(blocks)
        if self.quotas.limits:
            self.quotas.hold(self._owned(blocks))

    def _owned(self, blocks: Blocks) -> list[tuple[int, str, int]]:
        return [(block, self.terms[block].tenant, 1) for block in blocks.tolist()]

    def _unpublish(self, blocks: Blocks, reason: RemovalReason) -> None:
        idle = blocks[self.pool.refs[blocks] == 0]
        ids = blocks.tolist()
        if self.quotas.limits:
            self.quotas.hold(self._owned(idle[~self.lifecycle.pinned[idle]]))
            for block in ids:
                self.quotas.discharge(self.terms[block].tenant, 1)
        keys = self.index.discard(ids)
        self.lifecycle.forget(blocks)
        self.num_idle -= len(idle)
        self.pool.push(idle)
        now = self.clock.now()
        self.ages.leave(blocks, now, evicted=reason is RemovalReason.EVICTED)
        self.ledger.note(keys, reason, now)
        self.events.append(BlocksRemoved(now, tuple(keys), tuple(ids), reason))
