"""Host memory as a store: records in one arena that is reserved at once."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from kvwise.core.errors import CapacityError, InvariantError
from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.blocks import RawRecord, num_bytes_of, write_raw
from kvwise.tiers.memory import allocate
from kvwise.tiers.record import ALIGNMENT, padded
from kvwise.tiers.scratch import Scratch
from kvwise.tiers.space import Run, Space

_LONG = 16 << 10  # bytes worth a copy without the interpreter's lock, which numpy makes


class _Place(NamedTuple):
    """Where a record lies."""

    runs: list[Run]
    num_bytes: int


class HostStore:
    """A `ByteStore` of `capacity_bytes` of host memory.

    A record that fits by its size always fits: what finds no run long enough lies in several, and is put together in
    the reading thread's own buffer. Records of one size (all raw ones of a model) never need that: they are written in
    one pass over `num_threads` threads, and read in place. Records of all sizes take their bytes, rounded up to 64.

    The system hands memory out when it is first written: the first round through the arena is slower. Wiping costs
    about what writing does, so only `delete(wipe=True)` does it. A view of a record that is deleted or replaced
    meanwhile may change under its reader: `blocks.py` checks what it has copied, not what it is about to copy.
    """

    persistent = False
    wipes = True

    def __init__(self, capacity_bytes: int, *, name: str = "host", num_threads: int = 1) -> None:
        if capacity_bytes < ALIGNMENT:
            raise CapacityError(f"{capacity_bytes} bytes of host memory hold no record; give the tier more")
        self.name = name
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self._num_threads = num_threads
        self._scratch = Scratch()
        self._mutex = Lock()  # guards everything below; bytes are moved outside of it
        self._memory = memoryview(allocate((self.capacity_bytes,), torch.uint8, torch.device("cpu")).numpy().data)
        self._space = Space(self.capacity_bytes)
        self._places: dict[bytes, _Place] = {}
        self._num_bytes = 0
        self._closed = False

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """See `ByteStore.write`. FULL if there is too little room; an older record of the key is then gone."""
        sizes = [num_bytes_of(pieces) for _, pieces in records]
        with self._mutex:
            memory = self._memory
            taken = self._take_together(sizes) or [
                self._take(key, size) for (key, _), size in zip(records, sizes, strict=True)
            ]
        try:
            self._fill(memory, records, taken)
        except BaseException:
            self._give_back([place for place in taken if isinstance(place, _Place)])
            raise
        with self._mutex:
            return self._publish(records, taken)

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """See `ByteStore.read`: views of the arena where a record lies in one run."""
        with self._mutex:
            if off := self._off():
                return [off] * len(extents)
            memory = self._memory
            places = [self._places.get(extent.key) for extent in extents]
        self._scratch.begin()
        return [
            Fault(FaultKind.MISSING) if place is None else self._cut(memory, place, extent.start, extent.stop)
            for place, extent in zip(places, extents, strict=True)
        ]

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """See `ByteStore.delete`; wiped bytes are zeros before anything else can lie there."""
        with self._mutex:
            if off := self._off():
                return [off] * len(keys)
            memory = self._memory
            gone = [place for key in keys if (place := self._remove(key))]
        if wipe:
            for place in gone:
                for start, stop in place.runs:
                    np.copyto(np.frombuffer(memory[start:stop], np.uint8), 0)
        self._give_back(gone)
        return [None] * len(keys)

    def scan(self) -> Iterator[memoryview]:
        """See `ByteStore.scan`; copies of whole records."""
        with self._mutex:
            memory = self._memory
            places = list(self._places.values())
        return (memoryview(b"".join(_views(memory, place))) for place in places)

    def num_bytes(self) -> int:
        """Bytes of the records, each rounded up to 64."""
        return self._num_bytes

    def close(self) -> None:
        """Forget all records, and give the memory back once nobody reads it any more; further calls answer OFF."""
        with self._mutex:
            self._closed = True
            self._memory = memoryview(b"")
            self._places.clear()
            self._space = Space(0)
            self._num_bytes = 0

    def check(self) -> None:
        """InvariantError unless every byte is free or one record's. Nobody may write or delete meanwhile."""
        with self._mutex:
            places = self._places.values()
            self._space.check(run for place in places for run in place.runs)
            for place in places:
                if sum(stop - start for start, stop in place.runs) != padded(place.num_bytes):
                    raise InvariantError(f"runs {place.runs} for a record of {place.num_bytes} bytes")
            if self._num_bytes != self._space.num_bytes - self._space.num_free:
                raise InvariantError(f"{self._num_bytes} bytes are said to be used, {self._space.num_free} to be free")

    # the book: the caller holds the mutex ----------------------------------------------------------------

    def _take_together(self, sizes: list[int]) -> list[_Place | Fault] | None:
        """One run for all: what is stored together lies together, and leaves one hole if it leaves together."""
        run = None if self._closed else self._space.take_run(sum(map(padded, sizes)))
        if run is None:
            return None
        starts = accumulate(map(padded, sizes), initial=run[0])
        return [_Place([pair], size) for pair, size in zip(pairwise(starts), sizes, strict=True)]

    def _take(self, key: bytes, num_bytes: int) -> _Place | Fault:
        if off := self._off():
            return off
        runs = self._space.take(num_bytes)
        if runs is None and (old := self._remove(key)):
            self._space.give_back(old.runs)
            runs = self._space.take(num_bytes)
        if runs is None:
            free, all_bytes = self._space.num_free, self.capacity_bytes
            return Fault(FaultKind.FULL, f"a record of {num_bytes} bytes, {free} of {all_bytes} are free")
        return _Place(runs, num_bytes)

    def _publish(
        self, records: Sequence[tuple[bytes, Sequence[Buffer]]], places: Sequence[_Place | Fault]
    ) -> list[Fault | None]:
        if off := self._off():
            return [off] * len(records)
        freed: list[Run] = []
        for (key, _), place in zip(records, places, strict=True):
            if isinstance(place, _Place):
                if old := self._remove(key):
                    freed += old.runs
                self._places[key] = place
                self._num_bytes += padded(place.num_bytes)
        self._space.give_back(freed)
        return [place if isinstance(place, Fault) else None for place in places]

    def _remove(self, key: bytes) -> _Place | None:
        place = self._places.pop(key, None)
        if place is not None:
            self._num_bytes -= padded(place.num_bytes)
        return place

    def _off(self) -> Fault | None:
        return Fault(FaultKind.OFF, f"{self.name} is closed") if self._closed else None

    # the bytes: the caller does not hold the mutex -------------------------------------------------------

    def _give_back(self, places: Sequence[_Place]) -> None:
        with self._mutex:
            if not self._closed:
                self._space.give_back([run for place in places for run in place.runs])

    def _fill(
        self,
        memory: memoryview,
        records: Sequence[tuple[bytes, Sequence[Buffer]]],
        places: Sequence[_Place | Fault],
    ) -> None:
        raw: list[RawRecord] = []
        targets: list[memoryview] = []
        for (_, pieces), place in zip(records, places, strict=True):
            if isinstance(place, Fault):
                continue
            if isinstance(pieces, RawRecord) and len(place.runs) == 1:
                raw.append(pieces)
                start = place.runs[0][0]
                targets.append(memory[start : start + place.num_bytes])
            else:
                _pour(pieces, _views(memory, place))
        write_raw(raw, targets, self._num_threads)

    def _cut(self, memory: memoryview, place: _Place, start: int, stop: int | None) -> memoryview:
        stop = place.num_bytes if stop is None else min(stop, place.num_bytes)
        if len(place.runs) == 1:
            first = place.runs[0][0]
            return memory[first + start : first + stop].toreadonly()
        whole = self._scratch.place(place.num_bytes)
        _pour(_views(memory, place), iter([whole]))
        return whole[start:stop].toreadonly()


def _views(memory: memoryview, place: _Place) -> Iterator[memoryview]:
    """The bytes of a record, run by run."""
    left = place.num_bytes
    for start, stop in place.runs:
        yield memory[start : min(stop, start + left)]
        left -= stop - start


def _pour(pieces: Iterable[Buffer], rooms: Iterator[memoryview]) -> None:
    """Copy pieces into rooms, both one after another; there is room enough."""
    room = memoryview(b"")
    for piece in pieces:
        data = memoryview(piece).cast("B")
        while len(data):
            room = room if len(room) else next(rooms)
            count = min(len(data), len(room))
            if count < _LONG:
                room[:count] = data[:count]
            else:
                np.copyto(np.frombuffer(room[:count], np.uint8), np.frombuffer(data[:count], np.uint8))
            room, data = room[count:], data[count:]
