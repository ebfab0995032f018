"""The proof that a tier's book is exact: keys, bytes, tenants, holds, pins, ranks."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set

import numpy as np

from kvwise.cache.entry import Entry
from kvwise.cache.proof import require
from kvwise.cache.slots import Bools, Slots


def check_keys(
    resident: Mapping[bytes, int], writing: Mapping[bytes, int], entries: Sequence[Entry | None], doomed: Set[bytes]
) -> None:
    """Key -> slot and slot -> entry are inverse, and each key is resident or being written."""
    slots = {entry.key: slot for slot, entry in enumerate(entries) if entry is not None}
    require(len(slots) == len(resident) + len(writing), "entries differ in number from the keys")
    require({**resident, **writing} == slots, "the keys' slots differ from the slots' keys")
    require(doomed <= writing.keys(), "removed in the midst of a write that is not under way")


def check_slots(slots: Slots, taken: Mapping[int, tuple[int, str]], resident: Bools, held: Sequence[int]) -> None:
    """Compare with what stands in the slots: `taken` slot -> (bytes, tenant), which are resident, which are held."""
    require(sorted([*slots.free, *taken]) == list(range(len(slots.size))), "slots are not either free or taken")
    require(slots.num_bytes == sum(size for size, _ in taken.values()), f"num_bytes {slots.num_bytes} is wrong")
    require(slots.num_bytes <= slots.capacity, f"{slots.num_bytes} bytes in a tier of {slots.capacity}")
    used: Counter[str] = Counter()
    for slot, (size, tenant) in taken.items():
        require((int(slots.size[slot]), slots.tenant[slot]) == (size, tenant), f"slot {slot} has another's size")
        used[tenant] += size
    require(slots.quotas.used == used, "bytes of tenants miscounted")
    require(sorted(held) == np.flatnonzero(slots.held).tolist(), "held slots differ from the held keys")
    require(not (slots.pinned & ~resident).any(), "an absent entry is pinned")
    require(slots.num_pinned == int(slots.pinned.sum()), f"num_pinned {slots.num_pinned} is wrong")
    require(not (np.isfinite(slots.pins.at) & ~slots.pinned).any(), "a pin's deadline without a pin")
    require(not slots.pins.num_overlooked(), "a pin's deadline that no sweep will find in time")
    idle = resident & ~slots.held & ~slots.pinned
    require(bool((slots.idle == idle).all()), "who may leave differs from who is neither held nor pinned")
    require(len(slots.policy) == int(idle.sum()), f"the policy ranks {len(slots.policy)} slots, {idle.sum()} may leave")
    require(slots.num_idle_bytes == int(slots.size[idle].sum()), f"num_idle_bytes {slots.num_idle_bytes} is wrong")
    ranked = slots.quotas.idle()
    for tenant, limit in slots.quotas.limits.items():
        require(used[tenant] <= limit, f"tenant {tenant!r} keeps {used[tenant]} of at most {limit}")
        own = {slot: taken[slot][0] for slot in np.flatnonzero(idle).tolist() if taken[slot][1] == tenant}
        require(ranked[tenant] == own, f"idle slots of tenant {tenant!r} differ")
