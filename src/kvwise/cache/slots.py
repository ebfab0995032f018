"""The slots of a tier: how large each is and whose, what holds it back, and who leaves when room is needed."""

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
import numpy.typing as npt

from kvwise.cache.deadlines import Deadlines
from kvwise.cache.quotas import Quotas
from kvwise.policies.base import Blocks, ReplacementPolicy, Tags

Bools = npt.NDArray[np.bool_]


class Slots:
    """Slots `0 .. num_slots-1` of at most `capacity` bytes together (infinity: no limit).

    A slot is *free*, *taken* (its bytes count), or taken and *resident*: ranked by the policy. A resident slot is
    *idle*, so that it may leave, unless it is held or pinned. Methods trust their caller (`residency.TierIndex`) and
    validate nothing.
    """

    def __init__(self, num_slots: int, capacity: float, policy: ReplacementPolicy, quotas: Mapping[str, int]) -> None:
        self.policy = policy
        self.quotas = Quotas(quotas)
        self.capacity = capacity
        self.num_bytes = 0
        self.num_idle_bytes = 0
        self.num_pinned = 0
        self.idle: Bools = np.zeros(num_slots, np.bool_)
        self.held: Bools = np.zeros(num_slots, np.bool_)
        self.pinned: Bools = np.zeros(num_slots, np.bool_)
        self.pins = Deadlines(num_slots)
        self.size: Blocks = np.zeros(num_slots, np.int64)
        self.tenant: list[str] = [""] * num_slots
        self.free = list(range(num_slots - 1, -1, -1))
        self._largest = 1

    def fits(self, wanted: Sequence[tuple[int, str]]) -> list[bool]:
        """Which of the (bytes, tenant) would fit, earlier ones first, if everything idle left. Changes nothing."""
        room = self.capacity - self.num_bytes + self.num_idle_bytes
        num_slots = len(self.free) + len(self.policy)
        own = {tenant: self.quotas.room(tenant) for tenant in self.quotas.limits}
        granted = []
        for size, tenant in wanted:
            fits = size <= room and num_slots > 0 and size <= own.get(tenant, inf)
            granted.append(fits)
            if fits:
                room -= size
                num_slots -= 1
                if tenant in own:
                    own[tenant] -= size
        return granted

    def make_room(self, wanted: Sequence[tuple[int, str]]) -> Blocks:
        """Slots that must be given back before `wanted`, which fit, are taken; they are ranked no longer."""
        gone = [self._over_quota(tenant, wanted) for tenant in self.quotas.limits]
        left = sum(int(self.size[slots].sum()) for slots in gone)
        short = self.num_bytes - left + sum(size for size, _ in wanted) - self.capacity
        short_slots = len(wanted) - len(self.free) - sum(len(slots) for slots in gone)
        self._largest = max((self._largest, *(size for size, _ in wanted)))
        while short > 0 or short_slots > 0:
            # As many as must leave even if all are of the largest size seen: never one too many.
            by_bytes = -int(-short // self._largest) if short > 0 else 0
            victims = self.policy.victims(max(by_bytes, short_slots))
            self._unrank(victims)
            gone.append(victims)
            short -= int(self.size[victims].sum())
            short_slots -= len(victims)
        return np.concatenate(gone) if gone else np.zeros(0, np.int64)

    def take(self, wanted: Sequence[tuple[int, str]]) -> list[int]:
        """A free slot for each (bytes, tenant)."""
        slots = [self.free.pop() for _ in wanted]
        for slot, (size, tenant) in zip(slots, wanted, strict=True):
            self.size[slot] = size
            self.tenant[slot] = tenant
            self.num_bytes += size
            self.quotas.charge(tenant, size)
        return slots

    def give_back(self, slots: list[int]) -> None:
        """`slots`, ranked no longer, are free."""
        for slot, size in zip(slots, self.size[slots].tolist(), strict=True):
            self.num_bytes -= size
            self.quotas.discharge(self.tenant[slot], size)
        self.free += slots

    def insert(self, slots: Blocks, tags: Tags, depths: Blocks, held: Bools) -> None:
        """Taken `slots` are resident from now on; those `held` are no victims until let go."""
        self.policy.insert(slots, tags, depths)
        self.held[slots] = held
        self._offer(slots[~held])

    def forget(self, slots: Blocks) -> None:
        """Resident `slots` leave for another reason than room."""
        if len(slots):
            self.policy.remove(slots)
            self._unrank(slots[self.idle[slots]])
            self.held[slots] = False
            self._unpin(slots[self.pinned[slots]])

    def touch(self, slots: Blocks) -> None:
        """A hit of `slots`, first to last."""
        idle = slots[self.idle[slots]]
        self._hold_back(idle)
        self.policy.touch(slots)
        self._offer(idle)

    def hold(self, slots: Blocks) -> None:
        """`slots`, not held yet, are no victims until let go."""
        self.held[slots] = True
        self._hold_back(slots[self.idle[slots]])

    def let_go(self, slots: Blocks) -> None:
        """The last hold of `slots` went."""
        self.held[slots] = False
        self._offer(slots[~self.pinned[slots]])

    def pin(self, slots: Blocks, until: float) -> None:
        """`slots` are no victims until `until` seconds; of two pins the later deadline holds."""
        at = np.full(len(slots), until)
        again = self.pinned[slots]
        at[again] = np.maximum(until, self.pins.at[slots[again]])
        self.pinned[slots] = True
        self.pins.set(slots, at)
        self.num_pinned += int(np.count_nonzero(~again))
        self._hold_back(slots[self.idle[slots]])

    def unpin(self, slots: Blocks) -> int:
        """End the pins of `slots`; those not held may leave. Number of pins ended."""
        had = slots[self.pinned[slots]]
        self._unpin(had)
        self._offer(had[~self.held[had]])
        return len(had)

    def _over_quota(self, tenant: str, wanted: Sequence[tuple[int, str]]) -> Blocks:
        amount = sum(size for size, owner in wanted if owner == tenant)
        slots = np.array(self.quotas.victims(tenant, amount) if amount else [], np.int64)
        if len(slots):
            self.policy.remove(slots)
            self._unrank(slots)
        return slots

    def _unpin(self, slots: Blocks) -> None:
        self.pinned[slots] = False
        self.pins.clear(slots)
        self.num_pinned -= len(slots)

    def _offer(self, slots: Blocks) -> None:
        if len(slots):
            self.policy.offer(slots)
            self.idle[slots] = True
            self.num_idle_bytes += int(self.size[slots].sum())
            if self.quotas.limits:
                self.quotas.offer(self._owned(slots))

    def _hold_back(self, idle: Blocks) -> None:
        if len(idle):
            self.policy.hold(idle)
            self._unrank(idle)

    def _unrank(self, idle: Blocks) -> None:
        self.idle[idle] = False
        self.num_idle_bytes -= int(self.size[idle].sum())
        if self.quotas.limits:
            self.quotas.hold(self._owned(idle))

    def _owned(self, slots: Blocks) -> list[tuple[int, str, int]]:
        sizes = self.size[slots].tolist()
        return [(slot, self.tenant[slot], size) for slot, size in zip(slots.tolist(), sizes, strict=True)]
