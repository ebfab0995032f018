"""Appending records to a segment of our own: copied into aligned memory, written together, synced once."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np

from kvwise.tiers.base import Buffer
from kvwise.tiers.blocks import RawRecord, write_raw
from kvwise.tiers.disk.buffers import aligned
from kvwise.tiers.disk.folder import Folder
from kvwise.tiers.disk.index import Index
from kvwise.tiers.disk.janitor import Janitor
from kvwise.tiers.disk.segment import PAGE, Place, Segment, pages
from kvwise.tiers.disk.system import System

_STAGE_BYTES = 8 << 20
_HELD_COPY = 4096  # shorter pieces are copied faster without letting go of the interpreter

Item = tuple[bytes, Sequence[Buffer], int]  # key, pieces, bytes


class Writer:
    """Owns at most one segment at a time, by a lock on its file. Used by one thread at a time."""

    def __init__(
        self, system: System, folder: Folder, index: Index, janitor: Janitor, segment_bytes: int, walking: Lock
    ) -> None:
        self._system, self._folder, self._index, self._janitor = system, folder, index, janitor
        self._segment_bytes = segment_bytes
        self._walking = walking  # held while a segment is looked through: its end may be about to change
        self._stage: memoryview | None = None
        self._fd: int | None = None
        self._segment: Segment | None = None

    def write(self, items: Sequence[Item]) -> tuple[int, list[Place], OSError | None]:
        """Append the items in order and enter them in the index.

        How many are on the medium, which places their keys had before, and why the rest are not kept.
        """
        num_kept, former = 0, list[Place]()
        while num_kept < len(items):
            try:
                segment, fd = self._room()
                group = _fitting(items[num_kept:], self._segment_bytes - segment.end)
                places, error = self._append(segment, fd, group)
            except OSError as failed:
                places, error = [], failed
            # Entered before the segment is let go: one in which nothing lives would be removed.
            for (key, _, _), place in zip(group if places else (), places, strict=False):
                former += self._index.put(key, place)
            num_kept += len(places)
            if error is not None:
                self.retire()
                return num_kept, former, error
        return num_kept, former, None

    def _append(self, segment: Segment, fd: int, group: Sequence[Item]) -> tuple[list[Place], OSError | None]:
        places, end = [], segment.end
        for _, _, length in group:
            places.append(Place(segment, end, length))
            end += pages(length)
        written, error = segment.end, None
        try:
            for chunk in self._staged(group):
                while chunk:
                    done = self._system.pwrite(fd, chunk, written) // PAGE * PAGE
                    if done == 0 and chunk:  # less than a page fits: the system says why only when asked again
                        self._system.pwrite(fd, chunk, written)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    written += done
                    chunk = chunk[done:]
        except OSError as failed:
            error = failed
        places = [place for place in places if place.offset + place.num_bytes <= written]
        end = places[-1].offset + places[-1].num_bytes if places else segment.end
        try:
            if error is not None:
                self._system.ftruncate(fd, end)
            self._system.fdatasync(fd)
        except OSError as failed:
            # What did reach the medium is unknown now: nothing is kept.
            with contextlib.suppress(OSError):
                self._system.ftruncate(fd, segment.end)
            return [], error or failed
        segment.end = end
        return places, error

    def _staged(self, group: Sequence[Item]) -> Iterator[memoryview]:
        """The bytes of the records, each padded to a page, in memory a direct write takes; whole pages at a time.

        Raw records are written there many at once, copied and digested in one pass that holds up no Python.
        """
        if self._stage is None:
            self._stage = aligned(_STAGE_BYTES)
        stage, fill = self._stage, 0
        raw: list[tuple[RawRecord, memoryview]] = []
        for _, pieces, length in group:
            if isinstance(pieces, RawRecord) and pages(length) <= _STAGE_BYTES:
                if fill + pages(length) > _STAGE_BYTES:
                    _write_raw(raw)
                    yield stage[:fill]
                    fill = 0
                raw.append((pieces, stage[fill : fill + length]))
                stage[fill + length : fill + pages(length)] = bytes(pages(length) - length)
                fill += pages(length)
                continue
            for piece in (*pieces, bytes(pages(length) - length)):
                rest = memoryview(piece)
                rest = rest if rest.nbytes == 0 else rest.cast("B")
                while rest.nbytes:
                    count = min(rest.nbytes, _STAGE_BYTES - fill)
                    _copy(stage[fill : fill + count], rest[:count])
                    fill += count
                    rest = rest[count:]
                    if fill == _STAGE_BYTES:
                        _write_raw(raw)
                        yield stage
                        fill = 0
        _write_raw(raw)
        if fill:
            yield stage[:fill]

    def _room(self) -> tuple[Segment, int]:
        """The segment to append to, and its descriptor: ours, one that its owner left half empty, or a new one."""
        if self._segment is not None and self._fd is not None:
            if self._segment.end < self._segment_bytes and os.fstat(self._fd).st_nlink:
                return self._segment, self._fd
            self.retire()
        with self._walking:
            adopted = self._adopt()
            if adopted is None:
                name, fd = self._folder.create()
                adopted = self._index.segment(name), fd
            adopted[0].mine = adopted[0].writing = True
        self._segment, self._fd = adopted
        return adopted

    def _adopt(self) -> tuple[Segment, int] | None:
        for segment in list(self._index.segments.values()):
            if segment.flawed or segment.stuck_bytes or segment.end > self._segment_bytes // 2:
                continue
            with contextlib.suppress(OSError):
                fd = self._folder.open(segment.name)
                if self._system.lock(fd) and os.fstat(fd).st_nlink and pages(os.fstat(fd).st_size) == segment.end:
                    return segment, fd
                os.close(fd)
        return None

    def retire(self) -> None:
        """Let go of the segment: whoever comes may append to it, or remove it when nothing in it lives."""
        fd, segment = self._fd, self._segment
        self._fd = self._segment = None
        if fd is not None and segment is not None:
            segment.writing = False
            os.close(fd)
            self._janitor.add(segment, 0, 0)


def _fitting(items: Sequence[Item], room: int) -> Sequence[Item]:
    """The first items that fit into `room` bytes, at least one: a record larger than a segment has one of its own."""
    count, taken = 0, 0
    while count < len(items) and (count == 0 or taken + pages(items[count][2]) <= room):
        taken += pages(items[count][2])
        count += 1
    return items[:count]


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy; long pieces with the interpreter released, so that no step of the engine waits for it."""
    if source.nbytes < _HELD_COPY:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _write_raw(raw: list[tuple[RawRecord, memoryview]]) -> None:
    """Write what is waiting into its places, and forget it."""
    if raw:
        write_raw([record for record, _ in raw], [target for _, target in raw])
        raw.clear()
