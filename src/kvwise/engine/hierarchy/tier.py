"""One tier below the device: its book, its bytes, its breaker and the pace of its links, kept in step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import inf
from threading import RLock
from typing import NamedTuple, Protocol, runtime_checkable

from kvwise.cache.misses import Miss, MissReason, RemovalReason
from kvwise.cache.residency import Entry, TierIndex
from kvwise.core.clock import Clock
from kvwise.engine.hierarchy.pins import PinFile
from kvwise.tiers.base import Buffer, ByteStore, Extent, Fault, FaultKind
from kvwise.tiers.breaker import Breaker, BreakerState
from kvwise.tiers.pace import Pace
from kvwise.tiers.record import Header, read_header

_log = logging.getLogger(__name__)
EntryOf = Callable[[Header], Entry]
_PROBE = Extent(bytes(32), 0, 1)  # a key nobody has: asking for it tells whether the medium answers


@runtime_checkable
class Refreshes(Protocol):
    """A store that other processes write to as well, and that can tell what is new."""

    def refresh(self) -> Sequence[Buffer]:
        """The headers of records that others have added since the last look."""
        ...


class Item(NamedTuple):
    """A record on its way down, in pieces."""

    entry: Entry
    pieces: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class TierStats:
    """Figures of one tier since the start; bytes of records, blocks found and not found at admissions."""

    name: str
    num_blocks: int
    num_bytes: int
    capacity_bytes: int | None
    num_evicted: int
    num_expired: int
    num_stored: int
    num_loaded: int
    num_faults: Mapping[str, int]
    hits: int
    misses: int
    breaker: str


class Tier:
    """What one tier keeps, and the only way to its bytes. Thread-safe; no lock is held while bytes move.

    A block is found only once its bytes are written, and no longer from the moment it is chosen to leave. A fault of
    the medium never raises: it is a miss. `below` takes what leaves for lack of room, if it does not have it already.
    """

    def __init__(
        self, index: TierIndex, store: ByteStore, breaker: Breaker, *, read_pace: Pace, write_pace: Pace, clock: Clock,
        pin_file: PinFile | None = None,
    ) -> None:  # fmt: skip
        self.name = index.name
        self.index = index
        self.store = store
        self.breaker = breaker
        self.read_pace = read_pace
        self.write_pace = write_pace
        self.below: Tier | None = None
        self.banned: AbstractSet[bytes] = frozenset()  # purged: a write that was under way then keeps none of these
        self.num_stored = 0
        self.num_loaded = 0
        self.hits = 0
        self.misses = 0
        self.num_faults: dict[str, int] = {}
        self._clock = clock
        self._lock = RLock()
        self._overdue: list[bytes] = []  # expired, their bytes still to be deleted
        self._pin_file = pin_file
        self._kept_pins: dict[bytes, float] = {}  # of that file: until when, in seconds on the clock

    # -- look-up ------------------------------------------------------------------------------------------------

    @property
    def is_well(self) -> bool:
        """Whether loads may count on this tier."""
        return self.breaker.state is BreakerState.CLOSED

    def find(self, keys: Sequence[bytes]) -> int:
        """Length of the longest run from the start of `keys` that is here and readable. Changes nothing."""
        if not keys or not self.is_well:
            return 0
        with self._lock:
            return self.index.find(keys)

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of the records of `keys`; 0 for one that is not here."""
        with self._lock:
            return self.index.num_bytes_of(keys)

    def deadline(self, key: bytes) -> float:
        """When the block expires if nobody hits it, in seconds on the clock; minus infinity if it is not here."""
        with self._lock:
            return -inf if self.index.get(key) is None else self.index.deadlines_of([key])[0]

    def has(self, key: bytes) -> bool:
        """Whether the block is here, whatever the breaker says."""
        with self._lock:
            return self.index.get(key) is not None

    def miss(self, key: bytes, block_index: int) -> Miss | None:
        """Why block `block_index` of a prompt is not found here, or None if it is."""
        if not self.is_well:
            return Miss(MissReason.TIER_FAULT, block_index)
        with self._lock:
            return self.index.miss(key, block_index)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A request used these blocks, from here or from above."""
        with self._lock:
            self.index.touch(keys)

    def hold(self, keys: Sequence[bytes]) -> None:
        """These blocks will be wanted soon: keep them from eviction, until `let_go`."""
        with self._lock:
            self.index.hold(keys)

    def let_go(self, keys: Sequence[bytes]) -> None:
        """Take back one `hold` of each."""
        with self._lock:
            self.index.let_go(keys)

    def pin(self, keys: Sequence[bytes], until: float | None) -> int:
        """Keep those of `keys` that are here from eviction until `until` seconds (None: until `unpin`)."""
        with self._lock:
            return self.index.pin(keys, until)

    def unpin(self, keys: Sequence[bytes]) -> int:
        """End the pins of `keys`; the number ended."""
        with self._lock:
            return self.index.unpin(keys)

    def take_pins(self, offset: float) -> None:
        """Carry out what the command line has pinned and unpinned since the last look; `offset`: wall less clock."""
        found = None if self._pin_file is None else self._pin_file.news()
        if found is None:
            return
        pins = {key: until - offset for key, until in found.items()}
        with self._lock:
            self.index.unpin([key for key, until in self._kept_pins.items() if pins.get(key) != until])
            self._kept_pins = pins
            self._pin_kept(list(pins))

    def _pin_kept(self, keys: Sequence[bytes]) -> None:
        now = self._clock.now()
        for key in keys:
            if self._kept_pins.get(key, now) > now:
                self.index.pin([key], self._kept_pins[key])

    # -- bytes --------------------------------------------------------------------------------------------------

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """The bytes of each extent, unverified, at the pace of the link. Views last until this thread reads again."""
        if not self.breaker.allows():
            return [self._count(Fault(FaultKind.OFF, "the breaker is open"))] * len(extents)
        started = self._clock.now()
        found = self.store.read(extents)
        self._report(found)
        self.read_pace.charge(sum(len(view) for view in found if not isinstance(view, Fault)), started)
        return found

    def write(self, items: Sequence[Item]) -> list[bool]:
        """Keep these records; whether each is kept now, or was before. Pushes others out, down if there is a below."""
        if not self.breaker.allows():
            return [False] * len(items)
        unique = {item.entry.key: item for item in items}
        with self._lock:
            reserved = self.index.reserve([item.entry for item in unique.values()])
        self._forget_bytes([entry.key for entry in reserved.expired])
        self._demote(reserved.victims)
        new = [item for item, granted in zip(unique.values(), reserved.granted, strict=True) if granted]
        started = self._clock.now()
        answers = self.store.write([(item.entry.key, item.pieces) for item in new]) if new else []
        self._report(answers)
        with self._lock:
            self.index.cancel([i.entry.key for i, fault in zip(new, answers, strict=True) if fault is not None])
            written = [i.entry.key for i, fault in zip(new, answers, strict=True) if fault is None]
            unwanted = self.index.commit(written)
            late = [key for key in written if key in self.banned]
            unwanted += self.index.remove(late, RemovalReason.PURGED)
            self.num_stored += len(written) - len(unwanted)
            kept = [self.index.get(item.entry.key) is not None for item in items]
        self._forget_bytes([entry.key for entry in unwanted], wipe=True)
        num_bytes = sum(i.entry.num_bytes for i, fault in zip(new, answers, strict=True) if fault is None)
        if new:
            self.write_pace.charge(num_bytes, started)
        return kept

    def _demote(self, victims: Sequence[Entry]) -> None:
        """Bytes of blocks that left for lack of room: to the tier below if it lacks them, then off this one."""
        keys = [entry.key for entry in victims]
        if self.below is not None:
            missing = [entry for entry in victims if not self.below.has(entry.key)]
            # One at a time: a view lasts only until the next read, and a whole batch may be larger than the buffers.
            for entry in missing:
                view = self.store.read([Extent(entry.key)])[0]
                if not isinstance(view, Fault) and len(view) == entry.num_bytes:
                    self.below.write([Item(entry, [view])])
        self._forget_bytes(keys)

    def drop(self, key: bytes, fault: Fault, *, told: bool = False) -> None:
        """A record that came back wrong: it is not found any more, and its bytes go.

        `told`: the fault is the store's own answer, which was counted when it came.
        """
        if not told:
            self._count(fault)
            self.breaker.failure(fault)
        wrong = fault.kind in (FaultKind.CORRUPT, FaultKind.FOREIGN)
        with self._lock:
            gone = self.index.remove([key], RemovalReason.CORRUPT if wrong else RemovalReason.TIER_FAULT)
        self._forget_bytes([entry.key for entry in gone])

    # -- forgetting ---------------------------------------------------------------------------------------------

    def expire(self) -> int:
        """What is due is not found any more; its bytes go with the next `tidy`. The number expired."""
        with self._lock:
            expired = self.index.expire()
            self._overdue += [entry.key for entry in expired]
        return len(expired)

    @property
    def has_overdue(self) -> bool:
        """Whether expired records wait for `tidy`."""
        return bool(self._overdue)

    def tidy(self) -> None:
        """Work for the background: delete what has expired, and ask a broken tier whether it answers again."""
        with self._lock:
            keys, self._overdue = self._overdue, []
        if keys:
            self._forget_bytes(keys, wipe=True)
        if not self.is_well and self.breaker.allows():
            answer = self.store.read([_PROBE])[0]
            if isinstance(answer, Fault):
                self.breaker.failure(answer)  # "not there" is an answer
            else:
                self.breaker.success()

    def remove(self, keys: Sequence[bytes], reason: RemovalReason, *, wipe: bool) -> list[Entry]:
        """Forget these blocks now, with their bytes (overwritten first, if `wipe` and the medium can). Those gone."""
        with self._lock:
            gone = self.index.remove(keys, reason)
        self._forget_bytes([entry.key for entry in gone], wipe=wipe)
        return gone

    def keys_where(self, tenant: str | None = None) -> list[bytes]:
        """Keys of the records of a tenant (by its tag), or of all."""
        with self._lock:
            return [e.key for e in self.index.entries() if tenant is None or e.terms.tenant == tenant]

    def _forget_bytes(self, keys: Sequence[bytes], *, wipe: bool = False) -> None:
        if keys:
            with self._lock:  # not those that came back meanwhile, or are about to
                keys = [key for key in keys if not self._is_coming(key)]
            self._report(self.store.delete(keys, wipe=wipe))

    def _is_coming(self, key: bytes) -> bool:
        miss = self.index.miss(key)
        return miss is None or miss.reason is MissReason.PENDING

    # -- start and end ------------------------------------------------------------------------------------------

    def adopt(self, to_entry: EntryOf) -> int:
        """Book what a persistent store already holds; what does not fit or has expired is deleted. Blocks booked."""
        return sum(self._book(view, to_entry) for view in self.store.scan())

    def refresh(self, to_entry: EntryOf) -> int:
        """Book what other processes have stored since the last look, where the store can tell. Blocks booked."""
        if not isinstance(self.store, Refreshes) or not self.is_well:
            return 0
        return sum(self._book(view, to_entry) for view in self.store.refresh())

    def _book(self, view: Buffer, to_entry: EntryOf) -> bool:
        header = read_header(view)
        if isinstance(header, Fault):
            return False
        entry = to_entry(header)
        if entry.terms.expires_at <= self._clock.now():
            self.store.delete([entry.key])
            return False
        with self._lock:
            reserved = self.index.reserve([entry])
            self.index.commit([entry.key])
            self._pin_kept([entry.key])
        self._forget_bytes([e.key for e in (*reserved.victims, *reserved.expired)])
        if not reserved.granted[0] and not self.has(entry.key) and entry.key not in self._kept_pins:
            self.store.delete([entry.key])  # it does not fit
        return reserved.granted[0]

    def stats(self) -> TierStats:
        """Figures of this moment."""
        with self._lock:
            return TierStats(
                name=self.name,
                num_blocks=len(self.index),
                num_bytes=self.index.num_bytes,
                capacity_bytes=self.index.capacity_bytes,
                num_evicted=self.index.num_evicted,
                num_expired=self.index.num_expired,
                num_stored=self.num_stored,
                num_loaded=self.num_loaded,
                num_faults=dict(self.num_faults),
                hits=self.hits,
                misses=self.misses,
                breaker=str(self.breaker.state),
            )

    def close(self) -> None:
        """Close the store; what is persistent stays."""
        self.store.close()

    def _report(self, answers: Sequence[object]) -> None:
        """Tell the breaker how the medium did."""
        faults = [answer for answer in answers if isinstance(answer, Fault)]
        for fault in faults:
            self._count(fault)
            self.breaker.failure(fault)
        if len(faults) < len(answers):
            self.breaker.success()

    def _count(self, fault: Fault) -> Fault:
        with self._lock:
            first = str(fault.kind) not in self.num_faults
            self.num_faults[str(fault.kind)] = self.num_faults.get(str(fault.kind), 0) + 1
        if first:  # said once; the counter tells of the rest
            _log.warning("tier %s: %s", self.name, fault)
        return fault
