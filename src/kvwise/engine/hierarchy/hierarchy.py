"""The hierarchy: the tiers below the device, in order, and the blocks on their way to them."""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

from kvwise.cache.identity import Identity
from kvwise.cache.misses import Miss, MissReason, RemovalReason
from kvwise.cache.residency import Entry
from kvwise.cache.terms import Terms
from kvwise.core.clock import Clock
from kvwise.engine.hierarchy.device import DeviceBlocks
from kvwise.engine.hierarchy.names import Deadlines, record_key, tag, tag_text
from kvwise.engine.hierarchy.rates import Rates
from kvwise.engine.hierarchy.tier import Item, Tier, TierStats
from kvwise.engine.hierarchy.worker import Worker
from kvwise.policies.base import Blocks
from kvwise.tiers.base import Buffer, Extent, Fault
from kvwise.tiers.blocks import num_bytes_of, seal_blocks
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.record import NO_PROBE, Header, open_record

_MOST_COUNTED = 100_000  # blocks whose uses are counted before they are stored
_LOOKED_AHEAD_BYTES = 256 * 2**20  # fetched for waiting requests at a time
_FLUSH_S = 10.0
_REFRESH_S = 1.0  # how often to look for what other processes have stored


class StoredBlock(NamedTuple):
    """Where a block is: its key, and for each codec level the index of the fastest tier that has it (None: nowhere)."""

    key: bytes
    tiers: tuple[int | None, ...]
    num_bytes: tuple[int, ...]

    @property
    def best(self) -> int:
        """The best level there is (an index)."""
        return next(level for level, tier in enumerate(self.tiers) if tier is not None)


class Offer(NamedTuple):
    """Full blocks of one request, to be stored: keys and parents of their chain, block ids, index of the first.

    `probe` is a digest of the first block's tokens alone (see `PrefixKeys.bare_probe`).
    """

    keys: Sequence[bytes]
    parents: Sequence[bytes]
    first: int
    blocks: Blocks
    probe: bytes


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed from one tier; `overwritten` says whether the medium let the bytes be overwritten."""

    tier: str
    num_blocks: int
    num_bytes: int
    overwritten: bool


class Hierarchy:
    """Stores blocks that the device has computed, and says which of them are still there.

    `let_go` gives back blocks that were held while their bytes were read; `poll` calls it on the engine's thread.
    `through`: every tier gets a block at once; else the first one does, and what leaves a tier goes to the next.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        codec: Codec,
        device: DeviceBlocks,
        identity: Identity,
        clock: Clock,
        *,
        let_go: Callable[[Blocks], None],
        note_foreign: Callable[[list[bytes]], None],
        through: bool,
        store_after: int = 1,
        most_held: int,
    ) -> None:
        self.tiers = list(tiers)
        self.codec = codec
        self.device = device
        self.root = identity.root()
        self.rates = Rates()
        self.deadlines = Deadlines.start(clock)
        self.num_skipped = 0  # blocks not stored because too many were on their way when their request ended
        self._clock = clock
        self._let_go = let_go
        self._note_foreign = note_foreign
        self._through = through
        self._store_after = store_after
        self._most_held = most_held
        self._num_held = 0
        self._refresh_at = clock.now() + _REFRESH_S
        self._purged: set[bytes] = set()  # lately, while some of them may be on their way to a tier
        self._num_promoting = 0
        self._mutex = Lock()
        self._done: deque[Blocks] = deque()
        self._foreign: deque[bytes] = deque()  # probes of other models' prompts, for the reason of a miss
        self._uses: OrderedDict[bytes, int] = OrderedDict()
        self._ahead: dict[str, list[bytes]] = {}  # request -> keys held for it in the first tier
        self._saver = Worker("store")
        self._fetcher = Worker("fetch")
        for tier, below in zip(self.tiers, self.tiers[1:], strict=False):
            tier.below = below
        for tier in self.tiers:
            tier.banned = self._purged
        for tier in self.tiers:
            if tier.store.persistent:
                tier.take_pins(self.deadlines.offset)  # before anything could have to leave
                tier.adopt(self._entry_of)

    def _entry_of(self, header: Header) -> Entry:
        """The entry of a record found in a store; another model's is kept like any other, and known to be there."""
        if header.identity != self.root and header.probe != NO_PROBE:
            self._foreign.append(header.probe)
        return self.deadlines.entry(header)

    # -- look-up ------------------------------------------------------------------------------------------------

    def record_key(self, key: bytes, level: int) -> bytes:
        """The key of a block's record at a codec level."""
        return record_key(key, self.codec.levels[level], len(self.codec.levels))

    def find(self, keys: Sequence[bytes]) -> list[StoredBlock]:
        """The longest run from the start of `keys` that is below, in whatever tiers. Changes nothing."""
        last = len(self.codec.levels) - 1
        run = self._run([self.record_key(key, last) for key in keys])
        return [self._stored(key, tier, last) for key, tier in zip(keys, run, strict=False)]

    def _run(self, keys: list[bytes]) -> list[int]:
        """For each key of the longest run that is found, the fastest tier it is in."""
        where: list[int] = []
        while len(where) < len(keys):
            before = len(where)
            for index, tier in enumerate(self.tiers):
                where += [index] * tier.find(keys[len(where) :])
            if len(where) == before:
                break
        return where

    def _stored(self, key: bytes, tier: int, last: int) -> StoredBlock:
        if not last:
            return StoredBlock(key, (tier,), (self.tiers[tier].sizes([key])[0],))
        tiers = [next(iter(self._run([self.record_key(key, level)])), None) for level in range(last)]
        sizes = [
            0 if t is None else self.tiers[t].sizes([self.record_key(key, level)])[0]
            for level, t in enumerate([*tiers, tier])
        ]
        return StoredBlock(key, (*tiers, tier), tuple(sizes))

    def miss(self, key: bytes, block_index: int) -> Miss:
        """Why block `block_index` of a prompt is not found below: the reason of the lowest tier that knows one."""
        reasons = [tier.miss(self.record_key(key, len(self.codec.levels) - 1), block_index) for tier in self.tiers]
        known = [m for m in reasons if m is not None and m.reason is not MissReason.NEVER_STORED]
        return known[-1] if known else Miss(MissReason.NEVER_STORED, block_index)

    def deadline(self, stored: StoredBlock) -> float:
        """When a stored block expires, in seconds on the clock."""
        level = stored.best
        tier = stored.tiers[level]
        assert tier is not None
        return self.tiers[tier].deadline(self.record_key(stored.key, level))

    def note_use(self, keys: Sequence[bytes]) -> None:
        """A request was admitted that uses these blocks, from whatever tier: none should think them idle."""
        levels = range(len(self.codec.levels))
        names = [self.record_key(key, level) for key in keys for level in levels]
        for tier in self.tiers:
            tier.touch(names)

    # -- down ---------------------------------------------------------------------------------------------------

    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks of a request should go down now: used often enough, and not there yet. Counts a use of each."""
        targets = self.tiers if self._through else self.tiers[:1]
        return [self._used_enough(key) and self._missing(key, targets) for key in keys]

    def _missing(self, key: bytes, targets: Sequence[Tier]) -> bool:
        name = self.record_key(key, 0)
        if self._through:
            return any(tier.is_well and not tier.has(name) for tier in targets)
        return not any(tier.has(name) for tier in self.tiers)

    def _used_enough(self, key: bytes) -> bool:
        if self._store_after == 1:
            return True
        self._uses[key] = count = self._uses.pop(key, 0) + 1
        while len(self._uses) > _MOST_COUNTED:
            self._uses.popitem(last=False)
        return count >= self._store_after

    @property
    def num_held(self) -> int:
        """Blocks that are held for storing now."""
        return self._num_held

    @property
    def num_room(self) -> int:
        """Blocks that may be held for storing now, beside those that are."""
        return max(0, self._most_held - self._num_held)

    @property
    def num_last_room(self) -> int:
        """The same for a request that ends, whose blocks cannot be offered again: twice as many may be held."""
        return max(0, 2 * self._most_held - self._num_held)

    def save(self, offer: Offer, terms: Sequence[Terms]) -> None:
        """Write the blocks down in the background. They must be held, and are let go of by a later `poll`."""
        self._num_held += len(offer.blocks)
        self.device.ready()
        self._saver.submit(lambda: self._save(offer, terms))

    def _save(self, offer: Offer, terms: Sequence[Terms]) -> None:
        try:
            keys, values, places = self.device.read(offer.blocks.tolist())
            for level in range(len(self.codec.levels)):
                headers = [self._header(offer, i, terms[i], level) for i in range(len(offer.blocks))]
                sealed = seal_blocks(self.codec, level, headers, keys, values, places)
                items = [
                    self._item(header, pieces, kept)
                    for header, pieces, kept in zip(headers, sealed, terms, strict=True)
                    if header.key not in self._purged
                ]
                for tier in self.tiers if self._through else self.tiers[:1]:
                    tier.write(items)
        finally:
            self._done.append(offer.blocks)

    def _header(self, offer: Offer, i: int, terms: Terms, level: int) -> Header:
        stored_at, expires_at, idle_s = self.deadlines.header_times(terms)
        return Header(
            key=self.record_key(offer.keys[i], level),
            parent=offer.parents[i],
            identity=self.root,
            codec=self.codec.levels[level],
            num_tokens=self.device.layout.block_size,
            depth=offer.first + i,
            stored_at=stored_at,
            expires_at=expires_at,
            idle_s=idle_s,
            tenant=tag(terms.tenant),
            session=tag(terms.session),
            probe=offer.probe if offer.first + i == 0 and offer.probe else NO_PROBE,
        )

    def _item(self, header: Header, pieces: Sequence[Buffer], terms: Terms) -> Item:
        owners = replace(terms, tenant=tag_text(terms.tenant), session=tag_text(terms.session))
        return Item(Entry(header.key, num_bytes_of(pieces), header.depth, owners), pieces)

    # -- ahead of time ------------------------------------------------------------------------------------------

    def look_ahead(self, waiting: Mapping[str, Sequence[bytes]]) -> None:
        """Bring the blocks of waiting requests to the first tier and keep them there (request -> its keys).

        CachedAttention (arXiv 2403.19708): fetch and eviction that look at the queue. Requests that no longer wait
        are forgotten.
        """
        first = self.tiers[0]
        for name in [name for name in self._ahead if name not in waiting]:
            first.let_go(self._ahead.pop(name))
        budget = _LOOKED_AHEAD_BYTES
        for name, keys in waiting.items():
            if name in self._ahead or budget <= 0:
                continue
            found = self.find(keys)
            names = [self.record_key(block.key, block.best) for block in found]
            first.hold(names)
            self._ahead[name] = names
            below = [block for block in found if block.tiers[block.best] != 0]
            budget -= sum(block.num_bytes[block.best] for block in below)
            if below:
                self._fetcher.submit(lambda blocks=below: self._fetch(blocks))  # type: ignore[misc]

    def _fetch(self, blocks: Sequence[StoredBlock]) -> None:
        for block in blocks:
            level = block.best
            tier = block.tiers[level]
            assert tier is not None
            name = self.record_key(block.key, level)
            view = self.tiers[tier].read([Extent(name)])[0]
            if not isinstance(view, Fault):
                self.promote(tier, name, level, view)

    def promote(self, tier: int, name: bytes, level: int, view: memoryview) -> None:
        """Keep a record that came from `tier` in the first tier as well, if it is sound."""
        if tier == 0:
            return
        with self._mutex:
            self._num_promoting += 1
        try:
            self._promote(tier, name, level, view)
        finally:
            with self._mutex:
                self._num_promoting -= 1

    def _promote(self, tier: int, name: bytes, level: int, view: memoryview) -> None:
        found = open_record(view, name, self.root, self.codec.levels[level])
        if isinstance(found, Fault):
            self.tiers[tier].drop(name, found)
            return
        header = found[0]
        deadline = self.tiers[tier].deadline(name)
        if deadline <= self._clock.now():
            return  # it expired, was purged or left meanwhile
        terms = replace(self.deadlines.entry(header).terms, expires_at=deadline)
        self.tiers[0].write([Item(Entry(name, header.record_bytes, header.depth, terms), [view])])

    # -- each step ----------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """On the engine's thread: let go of blocks that are written down, and carry out what is due."""
        while self._done:
            blocks = self._done.popleft()
            self._num_held -= len(blocks)
            self._let_go(blocks)
        if self._foreign:
            self._note_foreign([self._foreign.popleft() for _ in range(len(self._foreign))])
        self._forget_purged()
        for tier in self.tiers:
            tier.expire()
        due = self._clock.now() >= self._refresh_at
        if not len(self._fetcher) and (due or any(not tier.is_well or tier.has_overdue for tier in self.tiers)):
            self._refresh_at = self._clock.now() + _REFRESH_S
            self._fetcher.submit(self._tidy)

    def _forget_purged(self) -> None:
        """Once nothing is on its way to a tier that was when it was purged."""
        if self._purged and not (len(self._saver) or len(self._fetcher) or self._num_promoting):
            self._purged.clear()

    def _tidy(self) -> None:
        for tier in self.tiers:
            tier.tidy()
            tier.refresh(self._entry_of)
            tier.take_pins(self.deadlines.offset)

    # -- forgetting ---------------------------------------------------------------------------------------------

    def purge(
        self, keys: Sequence[bytes], *, tenant: str | None = None, everything: bool = False,
        reason: RemovalReason = RemovalReason.PURGED,
    ) -> list[Purged]:  # fmt: skip
        """Forget blocks in every tier now and overwrite their bytes: those of `keys`, of a tenant, or all.

        What that was, tier by tier. Blocks on their way down are waited for; behind a tier that hangs, those that come
        later are not kept.
        """
        names = [self.record_key(key, level) for key in keys for level in range(len(self.codec.levels))]
        self.flush()
        if everything or tenant is not None:
            owner = None if everything or tenant is None else tag_text(tenant)
            names = list(dict.fromkeys(names + [key for tier in self.tiers for key in tier.keys_where(owner)]))
        self._purged.update(names)  # before they are removed: what is written after that is told by this
        report = []
        for tier in self.tiers:
            gone = tier.remove(names, reason, wipe=True)
            num_bytes = sum(entry.num_bytes for entry in gone)
            report.append(Purged(tier.name, len(gone), num_bytes, tier.store.wipes))
        self._forget_purged()
        return report

    def pin(self, keys: Sequence[bytes], until: float | None) -> int:
        """Keep blocks from eviction in every tier they are in; the number of records pinned."""
        names = [self.record_key(key, level) for key in keys for level in range(len(self.codec.levels))]
        return sum(tier.pin(names, until) for tier in self.tiers)

    def unpin(self, keys: Sequence[bytes]) -> int:
        """End pins in every tier; the number ended."""
        names = [self.record_key(key, level) for key in keys for level in range(len(self.codec.levels))]
        return sum(tier.unpin(names) for tier in self.tiers)

    def flush(self, timeout_s: float = _FLUSH_S) -> bool:
        """Wait until everything on its way down is there; False if that takes longer than `timeout_s` seconds."""
        done = self._saver.flush(timeout_s) and self._fetcher.flush(timeout_s)
        self.poll()
        return done

    # -- figures and end ----------------------------------------------------------------------------------------

    def stats(self) -> list[TierStats]:
        """Figures of every tier."""
        return [tier.stats() for tier in self.tiers]

    def links(self) -> dict[str, str]:
        """Labels of the links of all tiers."""
        return {p.name: p.label for tier in self.tiers for p in (tier.read_pace, tier.write_pace)}

    def close(self) -> None:
        """Finish what is on its way down, then close the tiers."""
        self._saver.close(_FLUSH_S)
        self._fetcher.close(_FLUSH_S)
        self.poll()
        for tier in self.tiers:
            tier.close()
