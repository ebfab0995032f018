"""One request's stored blocks on their way back into the device pool."""

import threading
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from kvwise.cache.misses import Miss, MissReason
from kvwise.core.clock import Clock
from kvwise.engine.hierarchy.hierarchy import Hierarchy, StoredBlock
from kvwise.engine.hierarchy.tier import Tier
from kvwise.methods.loading.base import Chunk, Decision, Flags, Loading, Outlook, Progress
from kvwise.policies.base import Blocks
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.blocks import layer_extent, restore_blocks, restore_layer
from kvwise.tiers.record import Header, header_bytes, read_header, refuse

_DROPPED = (FaultKind.CORRUPT, FaultKind.FOREIGN, FaultKind.MISSING)  # the record is of no use to anybody


class Load:
    """Carries out a loading method for one request. Two sides meet here, under one lock:

    * the I/O side (a driver's thread) asks the method for the next chunk, reads it, and writes sound blocks into the
      request's device blocks, which are held for it;
    * the engine's side claims blocks before it computes them and skips what has arrived.

    A block that is claimed is never written by the I/O side, so a late or hung transfer cannot touch what was computed.
    """

    def __init__(
        self, method: Loading, outlook: Outlook, decision: Decision, stored: Sequence[StoredBlock], blocks: Blocks,
        hierarchy: Hierarchy, clock: Clock, until: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.method = method
        self.outlook = outlook
        self.decision = decision
        self.stored = stored
        self.blocks = blocks
        self.until = until  # when each block expires, as it was at admission: its record may leave meanwhile
        self.started = clock.now()
        self.last_progress = self.started
        self.num_taken = 0  # blocks that stood in for computing
        self.num_bytes = 0  # read for this request, whether it was used or not
        self._io_s = 0.0  # that this took
        self.is_over = False  # the I/O side has ended: nobody writes to the blocks any more
        self.joined = False  # by layer only: the request computes on top of layers that are still coming
        self.broken: Fault | None = None  # then: what it computed is worth nothing
        self.news = threading.Condition()
        self._hierarchy = hierarchy
        self._clock = clock
        self._claimed = outlook.first
        self._arrived: Flags = np.zeros(outlook.stop - outlook.first, np.bool_)
        self._failed: Flags = self._arrived.copy()
        self._faults: dict[int, Fault] = {}  # block -> why it did not come
        self._layers = 0
        self._stopped = False
        self._last: tuple[int, float, str | None] = (0, 0.0, None)  # bytes, seconds and tier of the latest chunk
        self._last_step = (0, 0.0)  # tokens and seconds of the latest step that computed for this request
        self._under_way: tuple[Chunk, float] | None = None  # and since when
        self._loading = True
        self._headers: list[Header] = []
        self._reading: set[str] = set()

    # -- the engine's side --------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far it is now."""
        with self.news:
            return Progress(
                computed=self._claimed,
                arrived=self._arrived.copy(),
                failed=self._failed.copy(),
                layers=self._layers,
                elapsed_s=self._clock.now() - self.started,
                last_bytes=self._last[0],
                last_s=self._last[1],
                last_tier=self._last[2],
                last_tokens=self._last_step[0],
                last_step_s=self._last_step[1],
                under_way=None if self._under_way is None else self._under_way[0],
                waited_s=0.0 if self._under_way is None else self._clock.now() - self._under_way[1],
                loading=self._loading and not self._stopped,
            )

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step that computed `num_tokens` for this request took `seconds`."""
        self._last_step = (num_tokens, seconds)

    def arrived_until(self, block: int) -> int:
        """End of the run of arrived blocks that starts at `block`; `block` itself if it has not arrived."""
        first, stop = self.outlook.first, self.outlook.stop
        with self.news:
            while block < stop and self._arrived[block - first]:
                block += 1
            self._claimed = max(self._claimed, block)
            return block

    def claim(self, start: int, stop: int) -> int:
        """Take blocks from `start` (not arrived) up to `stop` for computing; the end of what was taken.

        It ends before the next block that has arrived, which need not be computed.
        """
        first = self.outlook.first
        with self.news:
            ahead = np.flatnonzero(self._arrived[max(start - first, 0) : max(stop - first, 0)])
            end = start + int(ahead[0]) if len(ahead) else stop
            self._claimed = max(self._claimed, end)
            return end

    def may_compute(self) -> bool:
        """Whether the step's leftover budget may go to this request."""
        now = self.progress()
        return not now.loading or self.method.may_compute(self.outlook, now)

    @property
    def is_given_up(self) -> bool:
        """Whether it ended before everything was there."""
        return (self._stopped or self.is_over) and not self.all_layers()

    @property
    def is_stopped(self) -> bool:
        """Whether what has not arrived never will."""
        return self._stopped

    def miss(self) -> Miss | None:
        """The first block that was asked for and did not come, and why."""
        with self.news:
            if not self._faults:
                return None
            block = min(self._faults)
            if self.until and self.until[block - self.outlook.first] <= self._clock.now():
                return Miss(MissReason.EXPIRED, block)
            wrong = self._faults[block].kind in (FaultKind.CORRUPT, FaultKind.FOREIGN)
        return Miss(MissReason.CORRUPT if wrong else MissReason.TIER_FAULT, block)

    def has_arrived(self, block: int) -> bool:
        """Whether a block of the run came back."""
        return bool(self._arrived[block - self.outlook.first])

    def stop(self) -> None:
        """Nothing more is wanted; a transfer under way ends by itself and writes nothing."""
        with self.news:
            self._stopped = True
            self._claimed = self.outlook.stop
            self.news.notify_all()

    def abandon(self, why: Fault) -> set[str]:
        """A transfer takes too long: whatever has not come must be computed. The tiers that were being read."""
        with self.news:
            self._stopped = True
            for at in np.flatnonzero(~(self._arrived | self._failed)).tolist():
                self._faults[self.outlook.first + at] = why
            self._failed |= ~self._arrived
            if self.joined:
                self.broken = why
            self.news.notify_all()
            return set(self._reading)

    def wait_for_layer(self, layer: int, deadline_s: float) -> bool:
        """Block until all blocks have `layer` (by-layer methods); False if that failed or took too long."""
        with self.news:
            self.news.wait_for(lambda: self._layers > layer or self.broken is not None, deadline_s)
            if self._layers <= layer and self.broken is None:
                self.broken = Fault(FaultKind.LATE, f"layer {layer} did not come within {deadline_s:g} s")
                self._faults.setdefault(self.outlook.first, self.broken)
                self._stopped = True
            return self.broken is None

    @property
    def end_block(self) -> int:
        """By layer: end of the run that is being loaded, the first block that failed."""
        failed = np.flatnonzero(self._failed)
        return self.outlook.first + int(failed[0]) if len(failed) else self.outlook.stop

    def join(self) -> int | None:
        """By layer: the request computes on top from now on. End of the run it may count on; None: nothing comes."""
        with self.news:
            end = self.end_block
            if self.is_given_up or end == self.outlook.first:
                return None
            self.joined = True
            return end

    def all_layers(self) -> bool:
        """Whether every layer of the run is there."""
        return self._layers == self.outlook.num_layers

    # -- the I/O side -------------------------------------------------------------------------------------------

    def next_chunk(self) -> Chunk | None:
        """What to read next; None: nothing more."""
        chunk = None if self._stopped else self.method.next_chunk(self.outlook, self.progress())
        with self.news:
            self._under_way = None if chunk is None else (chunk, self._clock.now())
            self._loading = chunk is not None
            self.news.notify_all()
        return chunk

    def chunk_bytes(self, chunk: Chunk) -> dict[str, int]:
        """Bytes of a chunk by tier, as the books say."""
        sizes: dict[str, int] = {}
        for block in self._wanted(chunk):
            stored = self.stored[block - self.outlook.first]
            level, tier = self._place(stored, chunk.level)
            share = stored.num_bytes[level] // (1 if chunk.layer is None else self.outlook.num_layers)
            sizes[self._hierarchy.tiers[tier].name] = sizes.get(self._hierarchy.tiers[tier].name, 0) + share
        return sizes

    def fetch(self, chunk: Chunk) -> int:
        """Read a chunk, verify it and put it in place; the bytes read."""
        if chunk.layer is not None:
            return self._fetch_layer(chunk.layer)
        total = 0
        wanted = [(block, *self._place(self.stored[block - self.outlook.first], chunk.level)) for block in
                  self._wanted(chunk)]  # fmt: skip
        for tier, group in groupby(sorted(wanted, key=lambda w: w[2]), key=lambda w: w[2]):
            total += self._fetch_blocks([(block, level) for block, level, _ in group], tier)
        return total

    def note(self, chunk: Chunk, num_bytes: int, seconds: float) -> None:
        """A chunk has come, or failed."""
        with self.news:
            self.num_bytes += num_bytes
            self._io_s += seconds if num_bytes else 0.0
            self._under_way = None
            if num_bytes:
                self._last = (num_bytes, seconds, self.outlook.tiers[chunk.start - self.outlook.first])
            self.last_progress = self._clock.now()
            self.news.notify_all()

    def seconds_for_all(self) -> float | None:
        """Seconds to load all stored blocks at the speed this load had; without one, as links were measured."""
        if self.num_bytes and len(set(self.outlook.tiers)) == 1:
            return self._io_s * sum(self.outlook.num_bytes) / self.num_bytes
        return seconds_to_load_all(self.outlook)

    def end(self) -> None:
        """The I/O side leaves."""
        with self.news:
            self.is_over, self._loading, self._under_way = True, False, None
            self.news.notify_all()

    def _wanted(self, chunk: Chunk) -> list[int]:
        first = self.outlook.first
        return [
            block for block in range(max(chunk.start, self._claimed), chunk.stop)
            if not self._arrived[block - first] and not self._failed[block - first]
        ]  # fmt: skip

    def _place(self, stored: StoredBlock, level: int | None) -> tuple[int, int]:
        """(level, tier) to read a block from: the level asked for, else the best there is."""
        if level is None or stored.tiers[level] is None:
            level = stored.best
        tier = stored.tiers[level]
        assert tier is not None
        return level, tier

    def _fetch_blocks(self, wanted: list[tuple[int, int]], index: int) -> int:
        tier = self._hierarchy.tiers[index]
        names = [self._name(block, level) for block, level in wanted]
        self._reading = {tier.name}
        tier.hold(names)
        try:
            views = tier.read([Extent(name) for name in names])
            for level, group in groupby(range(len(wanted)), key=lambda i: wanted[i][1]):
                chosen = list(group)
                self._take([wanted[i][0] for i in chosen], level, [views[i] for i in chosen], tier)
            for (_, level), name, view in zip(wanted, names, views, strict=True):
                if not isinstance(view, Fault):
                    self._hierarchy.promote(index, name, level, view)
        finally:
            tier.let_go(names)
            self._reading = set()
        return sum(len(view) for view in views if not isinstance(view, Fault))

    def _take(self, blocks: list[int], level: int, views: Sequence[memoryview | Fault], tier: Tier) -> None:
        """Put blocks in place, unless they were claimed meanwhile; one with a fault must be computed."""
        hierarchy, first = self._hierarchy, self.outlook.first
        faults: list[tuple[bytes, Fault, bool]] = []  # the last: whether the tier has told of it
        with self.news:
            left = [i for i, block in enumerate(blocks) if block >= self._claimed and not self._stopped]
            ids = [int(self.blocks[blocks[i] - first]) for i in left]
            names = [self._name(blocks[i], level) for i in left]
            keys, values, places = hierarchy.device.target(ids)
            found = restore_blocks(
                [views[i] for i in left], names, hierarchy.root, hierarchy.codec, level, keys, values, places
            )
            hierarchy.device.write(ids, keys, values)
            for i, name, fault in zip(left, names, found, strict=True):
                if fault is None:
                    self._arrived[blocks[i] - first] = True
                    tier.num_loaded += 1
                else:
                    self._failed[blocks[i] - first] = True
                    self._faults[blocks[i]] = fault
                    faults.append((name, fault, isinstance(views[i], Fault)))
            self.news.notify_all()
        for name, fault, told in faults:
            if fault.kind in _DROPPED:
                tier.drop(name, fault, told=told)

    def _name(self, block: int, level: int) -> bytes:
        return self._hierarchy.record_key(self.stored[block - self.outlook.first].key, level)

    # -- layer by layer -----------------------------------------------------------------------------------------

    def _fetch_layer(self, layer: int) -> int:
        """One layer of every block of the run, which may lie in several tiers. A fault ends the run before its block,
        or breaks the load if the request counts on it already.
        """
        total = self._read_headers() if not self._headers else 0
        count = self.end_block - self.outlook.first
        extents = [layer_extent(header, layer) for header in self._headers[:count]]
        for at, view in self._read_each(extents):
            total += 0 if isinstance(view, Fault) else len(view)
            fault = view if isinstance(view, Fault) else self._take_layer(at, layer, view)
            if fault is not None:
                self._cut(at, fault, told=isinstance(view, Fault))
                return total  # the method asks for the layer again, of the run that is left
        with self.news:
            self._layers = layer + 1
            if self.all_layers() and not self._stopped:
                self._arrived[:count] = True
                for stored in self.stored[:count]:
                    self._hierarchy.tiers[self._place(stored, 0)[1]].num_loaded += 1
            self.news.notify_all()
        return total

    def _read_headers(self) -> int:
        size = header_bytes(self.outlook.num_layers)
        headers: list[Header | Fault] = [Fault(FaultKind.MISSING)] * len(self.stored)
        names = [self._name(self.outlook.first + at, 0) for at in range(len(self.stored))]
        told = set[int]()
        for at, view in self._read_each([Extent(name, 0, size) for name in names]):
            headers[at] = self._check_header(names[at], view)
            if isinstance(view, Fault):
                told.add(at)
        bad = next((at for at, header in enumerate(headers) if isinstance(header, Fault)), None)
        if bad is not None:
            fault = headers[bad]
            assert isinstance(fault, Fault)
            self._cut(bad, fault, told=bad in told)
        self._headers = [header for header in headers[:bad] if isinstance(header, Header)]
        return size * len(self.stored)

    def _check_header(self, name: bytes, view: memoryview | Fault) -> Header | Fault:
        header = view if isinstance(view, Fault) else read_header(view)
        if isinstance(header, Fault):
            return header
        return refuse(header, name, self._hierarchy.root, self._hierarchy.codec.levels[0]) or header

    def _read_each(self, extents: Sequence[Extent]) -> Iterator[tuple[int, memoryview | Fault]]:
        """Read one extent of each of the first blocks, tier by tier; a view lasts until the next one is taken."""
        tiers = [self._place(stored, 0)[1] for stored in self.stored[: len(extents)]]
        for index in sorted(set(tiers)):
            places = [at for at, tier in enumerate(tiers) if tier == index]
            tier = self._hierarchy.tiers[index]
            self._reading = {tier.name}
            yield from zip(places, tier.read([extents[at] for at in places]), strict=True)
        self._reading = set()

    def _take_layer(self, at: int, layer: int, view: memoryview) -> Fault | None:
        device, block = self._hierarchy.device, int(self.blocks[at])
        with self.news:
            if self._stopped:
                return None
            keys, values, (place,) = device.target([block])
            out = keys[place, layer], values[place, layer]
            fault = restore_layer(view, self._headers[at], layer, self._hierarchy.codec, 0, *out)
            if fault is None:
                device.write([block], keys, values, layer)
            return fault

    def _cut(self, at: int, fault: Fault, *, told: bool) -> None:
        with self.news:
            self._failed[at] = True
            self._faults[self.outlook.first + at] = fault
            if self.joined:
                self.broken, self._stopped = fault, True
            self.news.notify_all()
        if fault.kind in _DROPPED:
            _, tier = self._place(self.stored[at], 0)
            self._hierarchy.tiers[tier].drop(self._name(self.outlook.first + at, 0), fault, told=told)


def estimate_both(outlook: Outlook) -> tuple[float | None, float | None]:
    """Seconds to compute all of it, and to load all of it, by what is known now."""
    size = outlook.block_size
    return outlook.seconds_to_compute(outlook.first * size, outlook.stop * size), seconds_to_load_all(outlook)


def seconds_to_load_all(outlook: Outlook) -> float | None:
    """Seconds to load all stored blocks, one tier after another, by what is known now; None: unknown."""
    by_tier: dict[str, int] = {}
    for tier, num_bytes in zip(outlook.tiers, outlook.num_bytes, strict=True):
        by_tier[tier] = by_tier.get(tier, 0) + num_bytes
    seconds = [outlook.seconds_to_load(tier, num_bytes) for tier, num_bytes in by_tier.items()]
    return None if None in seconds else sum(s for s in seconds if s is not None)
