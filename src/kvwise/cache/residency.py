"""Residency: the book of one tier below the device - which blocks are there, until when, and who may leave."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import inf

import numpy as np

from kvwise.cache.deadlines import Expiry
from kvwise.cache.entry import Entry, Reservation
from kvwise.cache.misses import Ledger, Miss, MissReason, RemovalReason
from kvwise.cache.proof import require
from kvwise.cache.residency_check import check_keys, check_slots
from kvwise.cache.slots import Slots
from kvwise.cache.terms import Terms
from kvwise.core.clock import Clock
from kvwise.core.errors import UsageError
from kvwise.policies.base import Blocks
from kvwise.policies.catalogue import make_policy

__all__ = ["Entry", "Reservation", "TierIndex"]

_MOST_REMEMBERED = 100_000  # departures, for miss reasons: about 20 MB


class TierIndex:
    """Which blocks one tier keeps. No bytes and no threads: whoever moves the bytes guards it by a lock.

    Life of an entry: `reserve` -> *writing* (counted, not found) -> `commit` -> *resident* (found) -> victim, `expire`
    or `remove`. Any resident entry may be a victim, in the policy's order, unless it is held or pinned. The policy
    ranks slots `0 .. max_blocks-1`; every call reaches it as one batch, however many keys it names.

    `capacity_bytes` None: no limit but `max_blocks`. `quotas`: bytes a tenant. Keys of one call are distinct.
    """

    def __init__(
        self,
        name: str,
        *,
        policy_name: str,
        clock: Clock,
        max_blocks: int,
        capacity_bytes: int | None = None,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        if max_blocks < 1 or (capacity_bytes is not None and capacity_bytes < 1):
            raise UsageError(f"tier {name!r} of {max_blocks} blocks, {capacity_bytes} bytes: each must be >= 1")
        self.name = name
        self.max_blocks = max_blocks
        self.capacity_bytes = capacity_bytes
        self.policy = make_policy(policy_name, max_blocks)
        self.num_evicted = 0
        self.num_expired = 0
        self._clock = clock
        self._slots = Slots(max_blocks, capacity_bytes or inf, self.policy, quotas or {})
        self._slot_of: dict[bytes, int] = {}
        self._writing: dict[bytes, int] = {}
        self._doomed: set[bytes] = set()
        self._holds: dict[bytes, int] = {}
        self._entry: list[Entry | None] = [None] * max_blocks
        self._expiry = Expiry(max_blocks)
        self._ledger = Ledger(max(1024, min(4 * max_blocks, _MOST_REMEMBERED)))

    def __len__(self) -> int:
        return len(self._slot_of) + len(self._writing)

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries, those being written too."""
        return self._slots.num_bytes

    @property
    def num_pinned(self) -> int:
        """Pinned entries."""
        return self._slots.num_pinned

    def tenant_bytes(self, tenant: str) -> int:
        """Bytes of the tenant's entries, those being written too."""
        return self._slots.quotas.used[tenant]

    def entries(self) -> Iterator[Entry]:
        """Everything that counts here, those being written too, in no order; valid until the next change."""
        return iter(self._entries_at(chain(self._slot_of.values(), self._writing.values())))

    # -- look-up -----------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> int:
        """Length of the longest run from the start of `keys` that is resident and not expired. Changes nothing."""
        slots: list[int | None] = []
        step = 16
        while len(slots) < len(keys):
            part = list(map(self._slot_of.get, keys[len(slots) : len(slots) + step]))
            if None in part:
                slots += part[: part.index(None)]
                break
            slots += part
            step *= 4  # short at first: most misses are misses at once
        if not slots or self._expiry.soonest > (now := self._clock.now()):
            return len(slots)
        late = np.flatnonzero(self._expiry.at[np.array(slots, np.int64)] <= now)
        return int(late[0]) if len(late) else len(slots)

    def get(self, key: bytes) -> Entry | None:
        """The entry of `key` if it is resident and not expired."""
        slot = self._slot_of.get(key)
        return None if slot is None or self._is_late(slot) else self._entry[slot]

    def num_bytes_of(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each resident entry; 0 for a key that is not here."""
        return [0 if (entry := self.get(key)) is None else entry.num_bytes for key in keys]

    def deadlines_of(self, keys: Sequence[bytes]) -> list[float]:
        """When each resident entry expires if nobody hits it again, in seconds; infinity: never, or not here."""
        return [inf if (slot := self._slot_of.get(key)) is None else float(self._expiry.at[slot]) for key in keys]

    def miss(self, key: bytes, block_index: int = 0) -> Miss | None:
        """Why `key`, block `block_index` of a prompt, is not found here; None if it is."""
        slot = self._slot_of.get(key)
        if slot is not None:
            return Miss(MissReason.EXPIRED, block_index) if self._is_late(slot) else None
        if key in self._writing:
            return Miss(MissReason.PENDING, block_index)
        departed = self._ledger.explain(key, block_index, self.policy.name)
        return departed or Miss(MissReason.NEVER_STORED, block_index)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A hit, first to last: the policy hears of it, idle times start anew. Absent and expired keys are skipped."""
        slots = self._resident(keys)
        if not len(slots):
            return
        if self._expiry.soonest < np.inf:
            now = self._clock.now()
            slots = slots[self._expiry.at[slots] > now]
            self._expiry.hit(slots, now)
        self._slots.touch(slots)

    # -- coming ------------------------------------------------------------------------------------

    def reserve(self, entries: Sequence[Entry]) -> Reservation:
        """Make room for `entries`, earlier ones first, by pushing out others; the granted are *writing* from now on.

        Not granted: a key that is resident or being written, and what does not fit even if everything that may leave
        (of its tenant, where that one has a quota) does. Nothing granted now is a victim of the same call, so of a
        run larger than the tier only the start is granted.
        """
        expired = self.expire()
        absent = self._absent(entries)
        fits = iter(self._slots.fits([_wanted(entry) for entry, is_new in zip(entries, absent, strict=True) if is_new]))
        granted = [is_new and next(fits) for is_new in absent]
        new = [entry for entry, ok in zip(entries, granted, strict=True) if ok]
        victims: list[Entry] = []
        if new:
            wanted = [_wanted(entry) for entry in new]
            victims = self._leave(self._slots.make_room(wanted), RemovalReason.EVICTED)
            for entry, slot in zip(new, self._slots.take(wanted), strict=True):
                self._writing[entry.key] = slot
                self._entry[slot] = entry
        self.num_evicted += len(victims)
        return Reservation(granted, victims, expired)

    def commit(self, keys: Sequence[bytes]) -> list[Entry]:
        """The bytes of `keys` are written: they are found from now on. Keys that are not being written are skipped.

        Returns the entries that were removed while they were written, whose bytes the caller deletes now.
        """
        unwanted = self._end_doomed(keys)
        written = [(key, slot) for key in keys if (slot := self._writing.pop(key, None)) is not None]
        if written:
            self._slot_of.update(written)
            self._settle([key for key, _ in written], np.array([slot for _, slot in written], np.int64))
        return unwanted

    def cancel(self, keys: Sequence[bytes]) -> None:
        """The writes of `keys` failed: forget them. Keys that are not being written are skipped."""
        self._end_doomed(keys)
        self._free([slot for key in keys if (slot := self._writing.pop(key, None)) is not None])

    # -- staying -----------------------------------------------------------------------------------

    def hold(self, keys: Sequence[bytes]) -> None:
        """`keys` are being read, or wanted soon: no victims until let go, once for each hold.

        A hold is on the key: one that is not here yet is held from the moment it comes. Held entries may still expire
        or be removed.
        """
        fresh = []
        for key in keys:
            count = self._holds.get(key, 0)
            self._holds[key] = count + 1
            if not count:
                fresh.append(key)
        self._slots.hold(self._resident(fresh))

    def let_go(self, keys: Sequence[bytes]) -> None:
        """Take back one hold of each of `keys`; a key without one is skipped."""
        last = []
        for key in keys:
            count = self._holds.get(key, 0)
            if count > 1:
                self._holds[key] = count - 1
            elif count:
                del self._holds[key]
                last.append(key)
        self._slots.let_go(self._resident(last))

    def pin(self, keys: Sequence[bytes], until: float | None = None) -> int:
        """Keep those of `keys` that are resident from eviction until `until` seconds (None: until `unpin`).

        The number of entries pinned. Of two pins the later deadline holds; expiry and removal end a pin.
        """
        slots = self._resident([key for key in keys if self.get(key) is not None])
        self._slots.pin(slots, np.inf if until is None else until)
        return len(slots)

    def unpin(self, keys: Sequence[bytes]) -> int:
        """End the pins of `keys`, whoever set them; the number of pins ended."""
        return self._slots.unpin(self._resident(keys))

    # -- leaving -----------------------------------------------------------------------------------

    def remove(self, keys: Sequence[bytes], reason: RemovalReason) -> list[Entry]:
        """Forget `keys`, held and pinned ones too; the entries, whose bytes the caller deletes. Absent ones: skipped.

        One that is being written leaves when its write ends: `commit` names it once more.
        """
        slots = self._resident(keys)
        self._slots.forget(slots)
        gone = self._leave(slots, reason)
        doomed = [key for key in keys if key in self._writing and key not in self._doomed]
        self._doomed.update(doomed)
        self._ledger.note(doomed, reason, self._clock.now())
        return gone + self._entries_at(self._writing[key] for key in doomed)

    def expire(self, now: float | None = None) -> list[Entry]:
        """Carry out what is due at `now` (None: the clock's): expiry, ends of pins. The expired; O(1) if none."""
        soonest = min(self._expiry.soonest, self._slots.pins.soonest)
        if soonest == np.inf:
            return []
        now = self._clock.now() if now is None else now
        if now < soonest:
            return []
        late = self._expiry.take_due(now)
        self._slots.forget(late)
        self.num_expired += len(late)
        gone = self._leave(late, RemovalReason.EXPIRED)
        self._slots.unpin(self._slots.pins.take_due(now))
        return gone

    def check(self) -> None:
        """Prove that every count is exact and every entry in one state, else InvariantError. O(max_blocks)."""
        check_keys(self._slot_of, self._writing, self._entry, self._doomed)
        entries = {slot: _wanted(entry) for slot, entry in enumerate(self._entry) if entry is not None}
        resident = np.zeros(self.max_blocks, np.bool_)
        resident[list(self._slot_of.values())] = True
        held = [slot for key, slot in self._slot_of.items() if key in self._holds]
        check_slots(self._slots, entries, resident, held)
        require(all(count > 0 for count in self._holds.values()), "a hold of no one")
        require(not (np.isfinite(self._expiry.at) & ~resident).any(), "a deadline of an absent entry")
        require(not self._expiry.num_overlooked(), "a deadline that no sweep will find in time")

    # -- mechanics ---------------------------------------------------------------------------------

    def _resident(self, keys: Sequence[bytes]) -> Blocks:
        slots = list(map(self._slot_of.get, keys))
        return np.array([slot for slot in slots if slot is not None] if None in slots else slots, np.int64)

    def _entries_at(self, slots: Iterable[int]) -> list[Entry]:
        return [entry for slot in slots if (entry := self._entry[slot]) is not None]

    def _is_late(self, slot: int) -> bool:
        return self._expiry.soonest < np.inf and bool(self._expiry.at[slot] <= self._clock.now())

    def _absent(self, entries: Sequence[Entry]) -> list[bool]:
        resident, writing = self._slot_of, self._writing
        if len({entry.key for entry in entries}) < len(entries):
            raise UsageError(f"tier {self.name!r}: a key is named twice in one reservation")
        return [entry.key not in resident and entry.key not in writing for entry in entries]

    def _settle(self, keys: list[bytes], slots: Blocks) -> None:
        """`keys` in `slots` are resident: their deadlines run, the policy ranks them."""
        entries = self._entries_at(slots.tolist())
        ends = np.array([entry.terms.expires_at for entry in entries])
        idle_s = np.array([entry.terms.idle_s for entry in entries])
        self._expiry.date(slots, ends, idle_s, self._clock.now())
        tags = np.frombuffer(b"".join(keys), np.uint64).reshape(len(keys), -1)[:, 0]
        held = np.array([key in self._holds for key in keys] if self._holds else np.zeros(len(keys)), np.bool_)
        self._slots.insert(slots, tags, np.array([entry.depth for entry in entries], np.int64), held)

    def _leave(self, slots: Blocks, reason: RemovalReason) -> list[Entry]:
        """Forget resident `slots`, which are ranked no longer."""
        if not len(slots):
            return []
        ids = slots.tolist()
        gone = self._entries_at(ids)
        if reason is RemovalReason.EVICTED and self._expiry.soonest < inf:
            gone = list(map(_until, gone, self._expiry.at[slots].tolist()))
        keys = [entry.key for entry in gone]
        for key in keys:
            del self._slot_of[key]
        self._expiry.clear(slots)
        self._free(ids)
        self._ledger.note(keys, reason, self._clock.now())
        return gone

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self._entry[slot] = None
        self._slots.give_back(slots)

    def _end_doomed(self, keys: Sequence[bytes]) -> list[Entry]:
        """The writes of those of `keys` that were removed meanwhile ended: they are gone now."""
        doomed = [key for key in keys if key in self._doomed] if self._doomed else []
        slots = [self._writing.pop(key) for key in doomed]
        entries = self._entries_at(slots)
        self._doomed.difference_update(doomed)
        self._free(slots)
        return entries


def _until(entry: Entry, deadline: float) -> Entry:
    """The entry as it leaves: wherever it goes, nobody having used it, it has no more time than it had."""
    if deadline >= entry.terms.expires_at:
        return entry
    key, num_bytes, depth, terms = entry  # made anew by hand: `replace` costs three times as much, for every victim
    return Entry(key, num_bytes, depth, Terms(deadline, terms.idle_s, terms.tenant, terms.session))


def _wanted(entry: Entry) -> tuple[int, str]:
    return entry.num_bytes, entry.terms.tenant
