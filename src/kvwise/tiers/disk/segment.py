"""A segment file: records one after another, each at a multiple of a page, and how to find them in it again.

```
page 0    record: header and segments as record.py lays them out, padded with zeros to a page
page n    record ...
page m    tombstone: a page that says how many bytes from here on are dead; then a hole, once they are handed back
page k    record ...
```

Pages are written once: a deleted record's place is never used again, so that a place names one record for all time.
"""

import errno
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from xxhash import xxh3_128_digest

from kvwise.tiers.base import Fault
from kvwise.tiers.disk.buffers import aligned
from kvwise.tiers.disk.system import System
from kvwise.tiers.record import MAGIC, Header, read_header

PAGE = 4096
_DEAD = struct.Struct("<8sQ")
_DEAD_MAGIC = b"KVDEAD\x00\x01"
_DIGEST_BYTES = 16
# What a record starts with (record.py): magic, header bytes, number of segments, tokens, record bytes, key.
_START = struct.Struct("<8s8xQ32s")
START_BYTES = _START.size
_WINDOW = 256 << 10  # read at once where records are small, and to find the next record after a torn one
_LONGEST_HEADER = 32 << 10


@dataclass(eq=False, slots=True)
class Segment:
    """What is known of one file: up to where, and how much in it is alive."""

    name: str
    end: int = 0  # bytes known; appended by others beyond it
    num_live: int = 0
    live_bytes: int = 0  # pages of live records
    stuck_bytes: int = 0  # pages of dead ones that could not be handed back
    mine: bool = False  # this process appended to it
    writing: bool = False  # and does so now
    flawed: bool = False  # parts could not be read or deleted: never removed


class Place(NamedTuple):
    """Where a record is: `length` bytes from `offset` on."""

    segment: Segment
    offset: int
    length: int

    @property
    def num_bytes(self) -> int:
        """Bytes taken, whole pages."""
        return pages(self.length)


class Found(NamedTuple):
    """A whole record in a file: its offset, and the bytes of its header."""

    offset: int
    header: Header
    head: bytes


def pages(length: int) -> int:
    """Bytes of the pages that `length` bytes take."""
    return -(-length // PAGE) * PAGE


def tombstone(num_bytes: int) -> memoryview:
    """The page that declares `num_bytes` bytes dead, in memory a direct write may come from."""
    page = aligned(PAGE)
    body = _DEAD.pack(_DEAD_MAGIC, num_bytes)
    page[:] = (body + xxh3_128_digest(body)).ljust(PAGE, b"\x00")
    return page


def dead_bytes(page: memoryview) -> int | None:
    """How many bytes from the start of this page on are dead, if it is a tombstone."""
    magic, num_bytes = _DEAD.unpack_from(page)
    if magic != _DEAD_MAGIC or num_bytes < PAGE or num_bytes % PAGE:
        return None
    sound = xxh3_128_digest(page[: _DEAD.size]) == page[_DEAD.size : _DEAD.size + _DIGEST_BYTES]
    return int(num_bytes) if sound else None


def start_of(view: memoryview) -> tuple[int, bytes] | None:
    """Length and key that the record starting here claims (not verified), or None if no record starts here."""
    if len(view) < _START.size:
        return None
    magic, length, key = _START.unpack_from(view)
    return (length, key) if magic == MAGIC else None


class Walk:
    """One way through a file from `start` to `size`: what is alive, what is dead, what is neither.

    After a page that starts nothing sound, the search goes on page by page until a sound header comes.
    """

    def __init__(self, system: System, fd: int, start: int, size: int) -> None:
        self.found: list[Found] = []
        self.dead: list[tuple[int, int]] = []  # (offset, bytes): declared dead, not yet handed back
        self.junk: list[tuple[int, int]] = []  # (offset, bytes): torn, or damaged
        self.num_errors = 0  # pages that could not be read: nothing may be concluded from them
        self._system, self._fd, self._size = system, fd, size
        self._buffer = aligned(_WINDOW)
        self._window = (0, 0)  # the bytes of the file that the buffer holds
        self._ahead = _WINDOW
        self._run(start)

    @property
    def junk_at_end(self) -> int | None:
        """Where the junk starts that the file ends with: possibly a record that is being written."""
        if not self.junk or sum(self.junk[-1]) < self._size:
            return None
        return self.junk[-1][0]

    def _run(self, offset: int) -> None:
        while (position := self._next_data(offset)) is not None and position < self._size:
            step = self._step(position)
            self._ahead = _WINDOW if step <= _WINDOW // 4 else PAGE
            offset = position + step

    def _step(self, offset: int) -> int:
        """Note what starts at `offset`; the bytes to go on by."""
        page = self._read(offset, PAGE)
        if len(page) >= PAGE and (num_bytes := dead_bytes(page)) is not None:
            self.dead.append((offset, num_bytes))
            return num_bytes
        header = read_header(page) if page[: len(MAGIC)] == MAGIC else None
        if isinstance(header, Fault):
            page = self._read(offset, _LONGEST_HEADER)
            header = read_header(page)
        if isinstance(header, Header) and offset + header.record_bytes <= self._size:
            self.found.append(Found(offset, header, bytes(page[: header.header_bytes])))
            return pages(header.record_bytes)
        if self.junk and sum(self.junk[-1]) == offset:
            self.junk[-1] = (self.junk[-1][0], self.junk[-1][1] + PAGE)
        else:
            self.junk.append((offset, PAGE))
        return PAGE

    def _next_data(self, offset: int) -> int | None:
        """The first page from `offset` on that is no hole."""
        try:
            return max(offset, os.lseek(self._fd, offset, os.SEEK_DATA) // PAGE * PAGE)
        except OSError as error:
            return None if error.errno == errno.ENXIO else offset

    def _read(self, offset: int, num_bytes: int) -> memoryview:
        start, stop = self._window
        if not start <= offset <= offset + num_bytes <= stop:
            start, stop = offset, offset + self._fill(offset, max(num_bytes, self._ahead))
            self._window = start, stop
        return self._buffer[offset - start : min(offset + num_bytes, stop, self._size) - start]

    def _fill(self, offset: int, num_bytes: int) -> int:
        try:
            return self._system.preadv(self._fd, [self._buffer[:num_bytes]], offset)
        except OSError:
            if num_bytes > PAGE:
                return self._fill(offset, PAGE)
            self.num_errors += 1
            return 0
