"""A tier on a disk: a `ByteStore` over a folder."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock

from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.blocks import num_bytes_of
from kvwise.tiers.disk.folder import Folder, Handles
from kvwise.tiers.disk.index import Index
from kvwise.tiers.disk.janitor import Janitor
from kvwise.tiers.disk.reader import Reader, Wanted
from kvwise.tiers.disk.scanner import Scanner
from kvwise.tiers.disk.segment import PAGE, START_BYTES, Place, Segment, dead_bytes, start_of
from kvwise.tiers.disk.system import System, fault_of
from kvwise.tiers.disk.writer import Writer

_log = logging.getLogger(__name__)
_OPEN_FILES = 64
_REFRESH_S = 1.0
_QUARANTINE_S = 60.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 1.0, 60.0


class DiskStore:
    """Records in append-only segment files of about `segment_bytes` each, read and written past the page cache.

    Measured against one file for each record (`bench/tiers_disk.py --layout`): durable writes of 32 KiB records ran
    at 8.5 instead of 0.3 GB/s and reads at 3.3 instead of 1.2; at 200 KiB 4.7 instead of 1.9, and 2.7 instead of 2.2.
    At 2 MiB files are written nearly as fast (4.9 instead of 6.1), and read faster (5.9 instead of 3.3, into memory on
    small pages); on huge pages, which this store reads into, segments reach 5 to 7.

    Any number of processes may share the folder: each appends to a segment of its own, held by a lock, and reads and
    deletes everywhere. What others append is looked for when a key is missed, at most once a second, and by `refresh`
    and `scan`. A process that ends in whatever way leaves records that are whole or that are told from whole ones; a
    crash of the machine may also bring back what was deleted shortly before, unless it was wiped.

    Nothing is retried. When the disk is full, read-only or broken, writing rests for 1 s, then 2 s, up to 60 s of
    `clock`, or until a deletion makes room; a record that could not be read is left alone for 60 s.

    Raises UsageError if the folder is not a real directory, is `/`, belongs to somebody else, or cannot be written.
    """

    persistent = True
    wipes = True

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "disk",
        clock: Clock | None = None,
        segment_bytes: int = 128 << 20,
        in_flight: int = 2,
        system: System | None = None,
    ) -> None:
        if segment_bytes < PAGE or in_flight < 1:
            raise UsageError(
                f"disk tier {name}: segment_bytes={segment_bytes} must be at least {PAGE},"
                f" in_flight={in_flight} at least 1"
            )
        self.name = name
        self._clock = clock or MonotonicClock()
        self._process = os.getpid()
        system = system or System()
        self._folder = Folder(folder, system)
        self._handles = Handles(self._folder, _OPEN_FILES)
        self._index = Index()
        walking = Lock()
        self._janitor = Janitor(system, self._folder, self._handles, self._index)
        self._scanner = Scanner(system, self._folder, self._handles, self._index, self._janitor, walking)
        self._reader = Reader(system, self._handles, in_flight)
        self._writer = Writer(system, self._folder, self._index, self._janitor, segment_bytes, walking)
        self._writing = Lock()
        self._write_fault: Fault | None = None  # why writing rests
        self._write_again_at = 0.0
        self._backoff_s = _FIRST_BACKOFF_S
        self._refresh_at = float("-inf")
        self._quarantine: dict[Place, float] = {}  # until when
        self._scanned = False
        self._starting = Lock()
        self._num_calls = 0  # under way
        self._closed = False
        self._idle = Condition()

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """See `ByteStore.write`; one sync for all of them. Who is kept is on the medium."""
        with self._call() as fault:
            if fault or not records:
                return [fault for _ in records]
            items = [(key, pieces, num_bytes_of(pieces)) for key, pieces in records]
            with self._writing:
                if self._write_fault and self._clock.now() < self._write_again_at:
                    return [self._write_fault for _ in records]
                num_kept, former, error = self._writer.write(items)
                if error is not None and fault_of(error).kind == FaultKind.FULL and self._janitor.debt_bytes:
                    self._janitor.settle()  # what died lately may be all the room that is needed
                    more, others, error = self._writer.write(items[num_kept:])
                    num_kept, former = num_kept + more, former + others
                fault = self._note(error)
            self._janitor.bury(former)
            self._janitor.settle_soon()
            return [None] * num_kept + [fault] * (len(items) - num_kept)

    def _note(self, error: OSError | None) -> Fault | None:
        """Decide when to write again, and say once that writing has stopped, or goes on."""
        if error is None:
            if self._write_fault:
                _log.warning("disk tier %s is written again", self.name)
            self._write_fault, self._backoff_s = None, _FIRST_BACKOFF_S
            return None
        fault = fault_of(error)
        if not self._write_fault:
            _log.warning("disk tier %s is not written for now: %s", self.name, fault)
        self._write_fault = fault
        self._write_again_at = self._clock.now() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _LAST_BACKOFF_S)
        return fault

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """See `ByteStore.read`. Neighbours are read together; where a header is read, its key is checked."""
        with self._call() as fault:
            if fault:
                return [fault for _ in extents]
            places = self._places(extents)
            answers: list[memoryview | Fault] = [Fault(FaultKind.MISSING)] * len(extents)
            wanted: list[tuple[int, Wanted]] = []
            for number, (extent, place) in enumerate(zip(extents, places, strict=True)):
                if place is None:
                    continue
                if self._is_quarantined(place):
                    answers[number] = Fault(FaultKind.IO_ERROR, "it could not be read lately")
                    continue
                start, stop = _range(extent, place)
                answers[number] = memoryview(b"")
                if start < stop:
                    wanted.append((number, Wanted(place, start, stop if start else max(stop, START_BYTES))))
            got = self._reader.read([item for _, item in wanted]) if wanted else []
            for (number, item), view in zip(wanted, got, strict=True):
                answers[number] = self._checked(extents[number], item, view)
            return answers

    def _places(self, extents: Sequence[Extent]) -> list[Place | None]:
        places = [self._index.place_of(extent.key) for extent in extents]
        if None not in places or self._clock.now() < self._refresh_at:
            return places
        self._refresh_at = self._clock.now() + _REFRESH_S
        try:
            self._scanner.refresh()
        except OSError:
            return places
        return [self._index.place_of(extent.key) for extent in extents]

    def _checked(self, extent: Extent, item: Wanted, view: memoryview | Fault) -> memoryview | Fault:
        """What arrived, if it does not contradict what was asked for; the checksums are the reader's business."""
        if isinstance(view, Fault):
            if view.kind == FaultKind.IO_ERROR:
                self._quarantine[item.place] = self._clock.now() + _QUARANTINE_S
            elif view.kind == FaultKind.MISSING:
                self._forget_segment(item.place.segment)
            return view
        if item.start == 0:
            claim = start_of(view)
            if claim is None:
                return self._nothing_there(extent.key, item.place, view)
            length, key = claim
            if key != extent.key:
                return Fault(FaultKind.FOREIGN, "another key")
            if length != item.place.length:
                return Fault(FaultKind.CORRUPT, f"{length} bytes are claimed, {item.place.length} were written")
        return view[: _range(extent, item.place)[1] - item.start]

    def _nothing_there(self, key: bytes, place: Place, view: memoryview) -> Fault:
        """No record starts at its place: deleted by another process, or damaged."""
        if dead_bytes(view) is None and any(view[:START_BYTES]):
            return Fault(FaultKind.CORRUPT, "no record")
        self._index.forget(key, place)
        self._janitor.add(place.segment, place.offset, 0)
        return Fault(FaultKind.MISSING, "deleted meanwhile")

    def _forget_segment(self, segment: Segment) -> None:
        self._index.forget_segments([segment])
        self._handles.drop(segment.name)

    def _is_quarantined(self, place: Place) -> bool:
        until = self._quarantine.get(place)
        if until is None or self._clock.now() < until:
            return until is not None
        self._quarantine.pop(place, None)
        return False

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """See `ByteStore.delete`; also copies that other processes wrote, all of them if `wipe`.

        The bytes go back to the file system in the background, with `wipe` before this returns.
        """
        with self._call() as fault:
            if fault:
                return [fault for _ in keys]
            try:
                if wipe:
                    self._scanner.refresh()
            except OSError as error:
                return [fault_of(error) for _ in keys]
            places = [self._index.take(key) for key in keys]
            flat = [place for group in places for place in group]
            errors = dict(zip(flat, self._janitor.bury(flat, wipe=wipe), strict=True))
            for place in flat:
                self._quarantine.pop(place, None)
            if wipe:
                self._janitor.settle()
            self._janitor.settle_soon()
            full = self._write_fault is not None and self._write_fault.kind == FaultKind.FULL
            if full and any(error is None for error in errors.values()):
                self._write_again_at = self._clock.now()  # there is room again
            failed = [next((errors[place] for place in group if errors[place]), None) for group in places]
            return [fault_of(error) if error else None for error in failed]

    def scan(self) -> Iterator[memoryview]:
        """See `ByteStore.scan`: walks through all files again, and makes the index agree with them."""
        walk = self._scanner.scan()
        while True:
            with self._call(scanned=False) as fault:
                try:
                    found = None if fault else next(walk, None)
                except OSError:
                    found = None
                if found is None:
                    self._scanned = self._scanned or fault is None
                    walk.close()
                    return
            for record in found:
                yield memoryview(record.head)

    def refresh(self) -> list[memoryview]:
        """The headers of records that other processes appended since the last look; those they deleted are not told."""
        with self._call() as fault:
            try:
                return [] if fault else [memoryview(found.head) for found in self._scanner.refresh()]
            except OSError:
                return []

    def num_bytes(self) -> int:
        """Whole pages of all records known here, and of dead ones that the file system did not take back."""
        with self._call() as fault:
            return 0 if fault else self._index.num_bytes()

    def close(self) -> None:
        """See `ByteStore.close`; waits for calls under way, and until the bytes of dead records are given back."""
        if self._process != os.getpid():
            return  # the files are the parent's
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._num_calls == 0)
        self._writer.retire()
        self._janitor.close()
        self._reader.close()
        self._handles.close()
        self._folder.close()

    @contextmanager
    def _call(self, *, scanned: bool = True) -> Iterator[Fault | None]:
        """One call under way: `close` waits for it. Gives the fault that answers everything, if there is one."""
        if self._process != os.getpid():
            raise UsageError(f"disk tier {self.name} was opened by another process (fork): open one in this process")
        with self._idle:
            off = self._closed
            self._num_calls += not off
        if off:
            yield Fault(FaultKind.OFF, f"{self.name} is closed")
            return
        try:
            yield self._start() if scanned else None
        finally:
            with self._idle:
                self._num_calls -= 1
                self._idle.notify_all()

    def _start(self) -> Fault | None:
        """Build the index, unless a scan has."""
        if self._scanned:
            return None
        with self._starting:
            try:
                if not self._scanned:
                    for _ in self._scanner.scan():
                        pass
            except OSError as error:
                return fault_of(error)
            self._scanned = True
        return None


def _range(extent: Extent, place: Place) -> tuple[int, int]:
    """Bytes [start, stop) of an extent, cut at the end of its record."""
    stop = place.length if extent.stop is None else min(extent.stop, place.length)
    return min(extent.start, place.length), stop
