"""A tier opened without an engine: its records by their headers, and the pins beside them."""

import heapq
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

from kvwise.core.errors import UsageError
from kvwise.core.tiering import TierSpec
from kvwise.engine.hierarchy.names import record_key
from kvwise.engine.hierarchy.pins import PinFile
from kvwise.tiers.base import ByteStore, Extent, Fault, FaultKind
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.folder import MARKER, Folder
from kvwise.tiers.disk.segment import Walk
from kvwise.tiers.disk.system import System
from kvwise.tiers.object import ObjectStore
from kvwise.tiers.record import Header, open_record, read_header
from kvwise.tiers.redis import RedisStore

_READ_BYTES = 32 << 20  # verified at once
_PROBE = Extent(bytes(32), 0, 1)  # a key nobody has: asking for it tells whether the medium answers


class Bad(NamedTuple):
    """A record that must not be used, and why."""

    header: Header
    fault: Fault


def ends_at(header: Header) -> float:
    """When a record expires if nobody hits it, in Unix seconds; later hits of servers are not known."""
    return min(header.expires_at, header.stored_at + header.idle_s)


class Shelf:
    """The records of one disk, redis or object tier, and the pins beside them. Safe beside live servers.

    UsageError if the tier lies in the memory of another process, is not there, or does not answer.
    """

    def __init__(self, spec: TierSpec, *, wall: Callable[[], float] = time.time) -> None:
        self.spec = spec
        self._wall = wall
        self._pins = PinFile(spec.where) if spec.kind == "disk" else None
        self.num_torn = self._count_torn() if spec.kind == "disk" else 0  # before a scan cleans up
        self.store = _open(spec)
        answer = self.store.read([_PROBE])[0]
        if isinstance(answer, Fault) and answer.kind is not FaultKind.MISSING:
            self.store.close()
            raise UsageError(f"tier {spec.kind} does not answer ({answer}); check its path or url")

    def _count_torn(self) -> int:
        """Places in the files where no sound record starts: cut by a crash, or damaged. A scan removes them."""
        if not (Path(self.spec.where) / MARKER).is_file():
            raise UsageError(f"{self.spec.where}: there is no disk tier (no file {MARKER!r}); name the folder of one")
        system = System()
        folder, count = Folder(self.spec.where, system), 0
        try:
            for name, status in folder.segments().items():
                fd = folder.open(name)
                try:
                    walk = Walk(system, fd, 0, status.st_size)
                    busy = not system.lock(fd) and walk.junk_at_end is not None  # what a server is writing now
                    count += len(walk.junk) - busy
                finally:
                    os.close(fd)
        except OSError as error:
            raise UsageError(f"{self.spec.where}: {os.strerror(error.errno or 0)}") from None
        finally:
            folder.close()
        return count

    # -- looking ------------------------------------------------------------------------------------------------

    def records(self) -> list[Header]:
        """The header of every record; what has no sound header is removed on the way."""
        found = (read_header(view) for view in self.store.scan())
        return list({header.key: header for header in found if isinstance(header, Header)}.values())

    def expired(self, header: Header) -> bool:
        """Whether its time is over."""
        return ends_at(header) <= self._wall()

    def verify(self, records: Sequence[Header]) -> list[Bad]:
        """Read every record and check every byte; those that are bad. One deleted meanwhile by others is not."""
        bad: list[Bad] = []
        for part in _batches(records):
            views = self.store.read([Extent(header.key) for header in part])
            for header, view in zip(part, views, strict=True):
                found = view
                if not isinstance(view, Fault):
                    opened = open_record(view, header.key, header.identity, header.codec)
                    found = opened if isinstance(opened, Fault) else view
                if isinstance(found, Fault) and found.kind is not FaultKind.MISSING:
                    bad.append(Bad(header, found))
        return bad

    # -- pins ---------------------------------------------------------------------------------------------------

    def pins(self) -> dict[bytes, float]:
        """Pins that are not over: record key -> until when, Unix seconds."""
        now = self._wall()
        return {} if self._pins is None else {key: at for key, at in self._pins.read().items() if at > now}

    def pin(self, keys: Iterable[bytes], until: float = inf) -> None:
        """Keep records from eviction and purge until `until`, Unix seconds; live servers notice within a second."""
        self._pin_file().change(dict.fromkeys(keys, until))

    def unpin(self, keys: Iterable[bytes]) -> int:
        """End pins; the number ended."""
        ended = set(keys) & self.pins().keys()
        self._pin_file().change(drop=ended)
        return len(ended)

    def tidy_pins(self, records: Iterable[Header]) -> int:
        """Forget pins that are over, and pins of what is not there; how many."""
        if self._pins is None:
            return 0
        here, now, pins = {header.key for header in records}, self._wall(), self._pins.read()
        stale = [key for key, at in pins.items() if at <= now or key not in here]
        if stale:
            self._pins.change(drop=stale)
        return len(stale)

    def _pin_file(self) -> PinFile:
        if self._pins is None:
            raise UsageError(f"tier {self.spec.kind} keeps no pins: they lie in the folder of a disk tier")
        return self._pins

    # -- removing -----------------------------------------------------------------------------------------------

    def remove(self, records: Sequence[Header]) -> list[Bad]:
        """Delete records, overwritten first where the medium allows; those that could not be."""
        faults = self.store.delete([header.key for header in records], wipe=True)
        return [Bad(header, fault) for header, fault in zip(records, faults, strict=True) if fault is not None]

    def still_there(self, records: Sequence[Header]) -> list[Header]:
        """Which of these are found when they are looked up again, by key and by walking through everything."""
        views = self.store.read([Extent(header.key, 0, 1) for header in records])
        walked = {header.key for header in self.records()}
        return [
            header
            for header, view in zip(records, views, strict=True)
            if not isinstance(view, Fault) or header.key in walked
        ]

    def close(self) -> None:
        """Let go of the tier."""
        self.store.close()

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Chains:
    """Which records continue which. Records of one block at several codec levels belong together."""

    def __init__(self, records: Iterable[Header]) -> None:
        self._records = {header.key: header for header in records}
        codecs = {header.codec for header in self._records.values()}
        # A parent is named by its block's key; where a codec has several levels, its records have other keys.
        self._block = {key: key for key in self._records}
        for parent in {header.parent for header in self._records.values()}:
            for codec in codecs:
                name = record_key(parent, codec, 2)
                if name in self._records:
                    self._block[name] = parent
        self._of_block: dict[bytes, list[Header]] = {}
        self._children: dict[bytes, list[Header]] = {}
        for key, header in self._records.items():
            self._of_block.setdefault(self._block[key], []).append(header)
            self._children.setdefault(header.parent, []).append(header)

    def find(self, text: str) -> Header:
        """The record whose key starts with these hex digits; UsageError if there is none, or more than one."""
        digits = text.lower()
        found = [header for key, header in self._records.items() if key.hex().startswith(digits)]
        if not digits or not found:
            raise UsageError(f"key {text!r}: no record has it; see kvwise cache ls")
        if len(found) > 1:
            raise UsageError(f"key {text!r}: {len(found)} records begin like that; give more digits")
        return found[0]

    def prefix(self, header: Header) -> list[Header]:
        """A record and what it continues, first block first."""
        run: list[Header] = []
        members = self._of_block[self._block[header.key]]
        while members:
            run += members
            members = self._of_block.get(members[0].parent, [])
        return run[::-1]

    def continued(self, header: Header) -> list[Header]:
        """A record and all that continue it."""
        found: list[Header] = []
        blocks = [self._block[header.key]]
        while blocks:
            block = blocks.pop()
            found += self._of_block.get(block, [])
            blocks += {self._block[child.key] for child in self._children.get(block, [])}
        return found

    def leaving(self, fixed: Iterable[bytes] = ()) -> Iterator[Header]:
        """Records in the order they should make room: the oldest whose continuations are gone; those `fixed` stay."""
        fixed = set(fixed)
        waiting = Counter(header.parent for header in self._records.values())
        heap = [
            (header.stored_at, key, header)
            for key, header in self._records.items()
            if not waiting[self._block[key]] and key not in fixed
        ]
        heapq.heapify(heap)
        while heap:
            _, _, header = heapq.heappop(heap)
            yield header
            waiting[header.parent] -= 1
            if not waiting[header.parent]:
                for above in self._of_block.get(header.parent, []):
                    if above.key not in fixed:
                        heapq.heappush(heap, (above.stored_at, above.key, above))


def _open(spec: TierSpec) -> ByteStore:
    if spec.kind == "disk":
        return DiskStore(Path(spec.where))
    if spec.kind == "redis":
        return RedisStore(spec.where)
    if spec.kind == "object":
        return ObjectStore(spec.where)
    raise UsageError(
        f"tier {spec.kind} lies in the memory of one process; the command line reaches disk, redis, object"
    )


def _batches(records: Sequence[Header]) -> Iterator[list[Header]]:
    batch: list[Header] = []
    size = 0
    for header in records:
        if batch and size + header.record_bytes > _READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(header)
        size += header.record_bytes
    if batch:
        yield batch
