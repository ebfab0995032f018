"""Random operations on one tier's book against plain dicts that know what must be there, and what may leave."""

from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvwise.cache.misses import RemovalReason
from kvwise.cache.residency import Entry, TierIndex
from kvwise.cache.terms import Terms
from kvwise.core.clock import VirtualClock
from kvwise.policies.catalogue import policies

KEYS = [sha256(bytes([i])).digest() for i in range(12)]
CAPACITY, MAX_BLOCKS = 60, 7
QUOTAS = {"small": 25, "none": 0}
POLICIES = sorted(policies())

somekeys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True)
manykeys = st.sampled_from([KEYS, KEYS[::2], KEYS[1::2], KEYS[:6]])


@dataclass
class Kept:
    """What the model knows of one entry; `order` is when it was last used, in steps."""

    entry: Entry
    deadline: float
    order: int
    pinned_until: float | None = None


class TierIndexMachine(RuleBasedStateMachine):
    """Rules are what an engine does with a tier; the clock moves by itself, so that much is due but not swept."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.here: dict[bytes, Kept] = {}
        self.writing: dict[bytes, Entry] = {}
        self.doomed: set[bytes] = set()
        self.holds: dict[bytes, int] = {}
        self.gone: dict[bytes, str] = {}
        self.num_evicted = self.num_expired = self.order = 0

    @initialize(policy=st.sampled_from(POLICIES), bounded=st.booleans())
    def build(self, policy: str, bounded: bool) -> None:
        self.capacity = CAPACITY if bounded else inf
        self.index = TierIndex(
            "host",
            policy_name=policy,
            clock=self.clock,
            capacity_bytes=CAPACITY if bounded else None,
            max_blocks=MAX_BLOCKS,
            quotas=QUOTAS,
        )

    # what an engine does --------------------------------------------------------------------------------

    @rule(
        keys=somekeys,
        sizes=st.lists(st.sampled_from([10, 10, 3, 17, 70]), min_size=5, max_size=5),
        tenant=st.sampled_from(["", "", "small", "small", "small", "none"]),
        ttl=st.sampled_from([inf, inf, 4.0, -1.0]),
        idle=st.sampled_from([inf, 1.0, 2.0, 5.0]),
        at_once=st.sampled_from([True, True, False]),
    )
    def reserve(self, keys: list[bytes], sizes: list[int], tenant: str, ttl: float, idle: float, at_once: bool) -> None:
        terms = Terms(self.clock.now() + ttl, idle, tenant, "")
        entries = [Entry(key, size, i, terms) for i, (key, size) in enumerate(zip(keys, sizes, strict=False))]
        self.sweep_model()
        before = dict(self.here)
        granted, victims, expired = self.index.reserve(entries)
        assert {entry.key for entry in expired} == self.just_expired
        self.must_grant(entries, granted)
        for entry in victims:
            kept = self.here.pop(entry.key)
            left = replace(kept.entry.terms, expires_at=min(kept.entry.terms.expires_at, kept.deadline))
            assert entry == kept.entry._replace(terms=left)
            assert self.may_leave(entry.key, kept), "a held or pinned entry was a victim"
            self.gone[entry.key] = "evicted"
            self.num_evicted += 1
        self.no_victim_too_many(entries, granted, victims, before)
        for entry, fits in zip(entries, granted, strict=True):
            if fits:
                self.writing[entry.key] = entry
        if at_once and any(granted):
            self.end_writes([entry.key for entry, fits in zip(entries, granted, strict=True) if fits], failed=False)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), failed=st.booleans())
    def end_write(self, data: st.DataObject, failed: bool) -> None:
        self.end_writes(data.draw(st.lists(st.sampled_from(sorted(self.writing)), min_size=1, unique=True)), failed)

    def end_writes(self, keys: list[bytes], failed: bool) -> None:
        doomed = {key for key in keys if key in self.doomed}
        if failed:
            self.index.cancel([*keys, KEYS[0]] if KEYS[0] not in self.writing else keys)
        else:
            assert {entry.key for entry in self.index.commit(keys)} == doomed
        for key in keys:
            entry = self.writing.pop(key)
            if not failed and key not in doomed:
                self.order += 1
                self.here[key] = Kept(entry, entry.terms.deadline(self.clock.now()), self.order)
        self.doomed -= doomed

    @precondition(lambda self: self.here)
    @rule(keys=manykeys)
    def touch(self, keys: list[bytes]) -> None:
        self.index.touch(keys)
        for key in keys:
            if key in self.here and self.is_fresh(key):
                kept = self.here[key]
                self.order += 1
                kept.deadline, kept.order = kept.entry.terms.deadline(self.clock.now()), self.order
                assert kept.deadline <= kept.entry.terms.expires_at

    @rule(keys=st.lists(st.sampled_from(KEYS[:4]), min_size=1, unique=True))
    def hold(self, keys: list[bytes]) -> None:
        self.index.hold(keys)
        for key in keys:
            self.holds[key] = self.holds.get(key, 0) + 1

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.holds)))
        unheld = [other for other in KEYS if other not in self.holds][:1]
        self.index.let_go([key, *unheld])
        self.order += 1
        self.holds[key] -= 1
        if not self.holds[key]:
            del self.holds[key]
            if key in self.here:
                self.here[key].order = self.order

    @precondition(lambda self: self.here)
    @rule(keys=manykeys, seconds=st.sampled_from([None, 1.0, 3.0]))
    def pin(self, keys: list[bytes], seconds: float | None) -> None:
        until = inf if seconds is None else self.clock.now() + seconds
        fresh = [key for key in keys if key in self.here and self.is_fresh(key)]
        assert self.index.pin(keys, None if seconds is None else until) == len(fresh)
        for key in fresh:
            kept = self.here[key]
            kept.pinned_until = max(until, kept.pinned_until or until)

    @precondition(lambda self: self.here)
    @rule(keys=somekeys)
    def unpin(self, keys: list[bytes]) -> None:
        had = [key for key in keys if key in self.here and self.here[key].pinned_until is not None]
        assert self.index.unpin(keys) == len(had)
        for key in had:
            self.order += 1
            self.here[key].pinned_until, self.here[key].order = None, self.order

    @rule(keys=somekeys, reason=st.sampled_from([RemovalReason.PURGED, RemovalReason.CORRUPT]))
    def remove(self, keys: list[bytes], reason: RemovalReason) -> None:
        expected = {key for key in keys if key in self.here or (key in self.writing and key not in self.doomed)}
        assert {entry.key for entry in self.index.remove(keys, reason)} == expected
        for key in expected:
            if self.here.pop(key, None) is None:
                self.doomed.add(key)
            self.gone[key] = reason.value

    @rule(seconds=st.sampled_from([1.0, 1.0, 2.0]), swept=st.sampled_from([False, False, True]))
    def time_passes(self, seconds: float, swept: bool) -> None:
        self.clock.advance(seconds)
        if swept:
            self.sweep_model()
            assert {entry.key for entry in self.index.expire()} == self.just_expired

    # what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def everything_is_accounted_for(self) -> None:
        index = self.index
        index.check()
        fresh = {key for key in self.here if self.is_fresh(key)}
        assert {key for key in KEYS if index.get(key) is not None} == fresh
        assert {key for key in KEYS if index.miss(key) is None} == fresh
        assert {key for key in KEYS if index.find([key])} == fresh
        run = next((i for i, key in enumerate(KEYS) if key not in fresh), len(KEYS))
        assert index.find(KEYS) == run
        present = [kept.entry for kept in self.here.values()] + list(self.writing.values())
        assert sorted(index.entries()) == sorted(present)
        assert (len(index), index.num_bytes) == (len(present), sum(entry.num_bytes for entry in present))
        assert index.num_bytes <= self.capacity
        for tenant in ("", "big", *QUOTAS):
            used = sum(entry.num_bytes for entry in present if entry.terms.tenant == tenant)
            assert index.tenant_bytes(tenant) == used <= QUOTAS.get(tenant, inf)
        assert (index.num_evicted, index.num_expired) == (self.num_evicted, self.num_expired)
        assert index.num_pinned == sum(kept.pinned_until is not None for kept in self.here.values())
        for key in KEYS:
            if key in self.writing:
                assert index.miss(key).reason == "being computed"
            elif key in self.gone and key not in self.here:
                assert index.miss(key).reason == self.gone[key]
        deadlines = [self.here[key].deadline if key in self.here else inf for key in KEYS]
        assert index.deadlines_of(KEYS) == deadlines

    def teardown(self) -> None:
        self.index.commit(list(self.writing))
        self.index.remove(KEYS, RemovalReason.CLEARED)
        self.index.check()
        assert (len(self.index), self.index.num_bytes) == (0, 0)

    # the model ---------------------------------------------------------------------------------------------

    def is_fresh(self, key: bytes) -> bool:
        return self.here[key].deadline > self.clock.now()

    def may_leave(self, key: bytes, kept: Kept) -> bool:
        return key not in self.holds and kept.pinned_until is None

    def sweep_model(self) -> None:
        self.just_expired = {key for key in self.here if not self.is_fresh(key)}
        for key in self.just_expired:
            del self.here[key]
            self.gone[key] = "expired"
        self.num_expired += len(self.just_expired)
        for kept in self.here.values():
            if kept.pinned_until is not None and kept.pinned_until <= self.clock.now():
                kept.pinned_until = None

    def must_grant(self, entries: list[Entry], granted: list[bool]) -> None:
        """Earlier ones first: granted exactly if it fits after all that may leave left."""
        staying = [kept.entry for key, kept in self.here.items() if not self.may_leave(key, kept)]
        staying += self.writing.values()
        for entry, fits in zip(entries, granted, strict=True):
            tenant = entry.terms.tenant
            own = sum(other.num_bytes for other in staying if other.terms.tenant == tenant)
            expected = (
                entry.key not in self.here
                and entry.key not in self.writing
                and sum(other.num_bytes for other in staying) + entry.num_bytes <= self.capacity
                and len(staying) < MAX_BLOCKS
                and own + entry.num_bytes <= QUOTAS.get(tenant, inf)
            )
            assert fits == expected
            if fits:
                staying.append(entry)

    def no_victim_too_many(
        self, entries: list[Entry], granted: list[bool], victims: list[Entry], before: dict[bytes, Kept]
    ) -> None:
        """Without the last victim it would not have fitted; a quota's victims are its own oldest."""
        came = [entry for entry, fits in zip(entries, granted, strict=True) if fits]
        if not victims:
            return
        tenant = came[0].terms.tenant
        last = victims[-1]
        present = [kept.entry for kept in self.here.values()] + list(self.writing.values()) + came
        full = sum(entry.num_bytes for entry in present) + last.num_bytes > self.capacity
        full = full or len(present) + 1 > MAX_BLOCKS
        own = sum(entry.num_bytes for entry in present if entry.terms.tenant == tenant)
        over = last.terms.tenant == tenant and own + last.num_bytes > QUOTAS.get(tenant, inf)
        assert full or over
        if not full:
            ranks = [before[entry.key].order for entry in victims]
            kept = [k.order for k in self.here.values() if k.entry.terms.tenant == tenant and self.may_leave_now(k)]
            assert ranks == sorted(ranks)
            assert not kept or max(ranks) < min(kept), "not the tenant's oldest"

    def may_leave_now(self, kept: Kept) -> bool:
        return self.may_leave(kept.entry.key, kept)


TierIndexMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestTierIndexMachine = TierIndexMachine.TestCase
