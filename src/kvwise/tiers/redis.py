"""Records in Redis or Valkey: bounded batches, one deadline a call, answers received where they are used."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import NamedTuple

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.heads import HEAD_BYTES, MAX_HEAD_BYTES, front, is_cut
from kvwise.tiers.record import read_header
from kvwise.tiers.redis_pool import RedisPool
from kvwise.tiers.resp import Answer, Command, Refused, command, command_in_pieces, fresh
from kvwise.tiers.scratch import Scratch

_log = logging.getLogger(__name__)

_SCANNED = 256  # keys of one step of a scan
_ZEROS = memoryview(bytes(1 << 20))
_FOREVER_MS = 10**14  # three thousand years: what expires later does not expire


class RedisStore:
    """A `ByteStore` on one Redis (or Valkey) server: the record of a key is the string `prefix` + its 64 hex digits.

    `url` is redis://, rediss:// (TLS) or unix://, with user, password and options as redis-py takes them; nothing of
    it is ever printed but host and port. `timeout_s` is the deadline of one call, connecting included, whatever the
    number of its items: what is not there by then is LATE. Only name resolution is the system's and not bounded.
    A value of more than `max_record_bytes` is refused before it is received, and never written.

    Each record is stored with the time it has left (`expires_at` of its header, against the wall clock `wall`, Unix
    seconds), so that Redis forgets it too. Idle time slides with hits, also with those of other tiers, and is
    therefore left to the index above.
    """

    persistent = True
    wipes = True  # in the server's memory and its replicas; append-only file, snapshots and buffers are its own

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "kvwise:",
        timeout_s: float = 2.0,
        max_record_bytes: int = 64 << 20,
        name: str = "redis",
        wall: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < timeout_s < inf or max_record_bytes < 1 or len(prefix.encode()) > 256:
            raise UsageError(
                f"{name}: timeout_s={timeout_s:g} and max_record_bytes={max_record_bytes} must be above 0, and the"
                f" prefix ({len(prefix.encode())} bytes) at most 256 bytes long"
            )
        self.name = name
        self._timeout_s = timeout_s
        self._max_bytes = max_record_bytes
        self._wall = wall
        self._prefix = prefix.encode()
        self._pool = RedisPool(url, name)
        self._scratch = Scratch()

    def __repr__(self) -> str:
        return f"RedisStore({self._pool.place}, prefix={self._prefix.decode()!r})"

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """See `ByteStore.write`. What starts with no sound header is refused: nobody could tell when it expires."""
        deadline = self._deadline()
        out: list[Fault | None] = [None] * len(records)
        commands: dict[int, Command] = {}
        for index, (key, pieces) in enumerate(records):
            built = self._set(key, pieces)
            if isinstance(built, Fault):
                out[index] = built
            else:
                commands[index] = built
        for index, answer in zip(commands, self._pool.ask([*commands.values()], deadline), strict=True):
            out[index] = None if answer == "OK" else self._pool.fault(answer)
        return [self._pool.off()] * len(records) if self._pool.closed else out

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """See `ByteStore.read`."""
        deadline = self._deadline()
        self._scratch.begin()
        commands = [self._get_range(extent) for extent in extents]
        answers = self._pool.ask(commands, deadline, max_bytes=self._max_bytes + 1, place=self._scratch.place)
        out = [self._bytes(extent, answer) for extent, answer in zip(extents, answers, strict=True)]
        # Redis answers alike for a key that is absent and for a range behind the end of one that is there.
        empty = [i for i, got in enumerate(out) if not isinstance(got, Fault) and not got]
        if not empty:
            return out
        there = self._pool.ask([command(b"EXISTS", self._key(extents[i].key)) for i in empty], deadline)
        for i, answer in zip(empty, there, strict=True):
            if answer != 1:
                out[i] = Fault(FaultKind.MISSING) if answer == 0 else self._pool.fault(answer)
        return out

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """See `ByteStore.delete`. Values larger than a record may be, or no strings, are not overwritten.

        A record that could be deleted but not overwritten (Redis at its memory limit refuses that) is a fault.
        """
        deadline = self._deadline()
        names = [self._key(key) for key in keys]
        wiped = self._wipe(names, deadline) if wipe else [None] * len(names)
        deleted = self._pool.ask([command(b"DEL", name) for name in names], deadline)
        return [
            self._pool.fault(answer) if not isinstance(answer, int) else fault
            for fault, answer in zip(wiped, deleted, strict=True)
        ]

    def scan(self) -> Iterator[memoryview]:
        """See `ByteStore.scan`. Only names made of the prefix and 64 hex digits are looked at, and removed if bad.

        Ends early, with a line in the log, when the server fails.
        """
        for found in self._steps():
            bad = []
            for (name, num_bytes), head in zip(found, self._heads([each.name for each in found]), strict=True):
                if isinstance(head, Fault):
                    continue  # gone meanwhile, or the server is: then the next step says so
                header = read_header(head)
                if isinstance(header, Fault) or header.record_bytes != num_bytes or self._key(header.key) != name:
                    bad.append(name)
                else:
                    yield head
            if bad:
                _log.warning("%s: %d values under its prefix are no records: removed", self.name, len(bad))
                self._pool.ask([command(b"DEL", name) for name in bad], self._deadline())

    def num_bytes(self) -> int:
        """Bytes of all values under the prefix; of those that could be counted if the server fails meanwhile.

        Walks all keys: for a report, not for a loop.
        """
        return sum(found.num_bytes for step in self._steps() for found in step)

    def close(self) -> None:
        """Hang up; the records stay. Calls under way end with OFF."""
        self._pool.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _key(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _set(self, key: bytes, pieces: Sequence[Buffer]) -> Command | Fault:
        num_bytes = sum(memoryview(piece).nbytes for piece in pieces)
        if num_bytes > self._max_bytes:
            return Fault(FaultKind.FULL, f"{num_bytes} bytes, at most {self._max_bytes} are taken")
        header = read_header(front(pieces))
        if isinstance(header, Fault):
            return header
        words: list[Sequence[Buffer]] = [[b"SET"], [self._key(key)], pieces]
        left_ms = (header.expires_at - self._wall()) * 1000
        if left_ms < _FOREVER_MS:
            words += [[b"PX"], [b"%d" % max(1, int(left_ms))]]
        return command_in_pieces(words)

    def _get_range(self, extent: Extent) -> Command:
        # One byte more than a record may have tells that it has more. Redis' last byte is inclusive, and -1 the end.
        stop = self._max_bytes + 1 if extent.stop is None else min(extent.stop, self._max_bytes + 1)
        first, last = (extent.start, stop - 1) if stop > extent.start else (1, 0)
        return command(b"GETRANGE", self._key(extent.key), b"%d" % first, b"%d" % last)

    def _bytes(self, extent: Extent, answer: Answer | Fault) -> memoryview | Fault:
        if not isinstance(answer, memoryview):
            return self._pool.fault(answer)
        if not answer and extent.start == 0 and extent.stop != 0:
            return Fault(FaultKind.MISSING)
        if answer and extent.start + len(answer) > self._max_bytes:
            return Fault(FaultKind.CORRUPT, f"a value of more than {self._max_bytes} bytes")
        return answer

    def _wipe(self, names: Sequence[bytes], deadline: float) -> list[Fault | None]:
        """Overwrite the values with zeros; what went wrong with each."""
        out: list[Fault | None] = [None] * len(names)
        sizes = self._pool.ask([command(b"STRLEN", name) for name in names], deadline)
        commands = {
            i: _overwrite(names[i], size)
            for i, size in enumerate(sizes)
            if isinstance(size, int) and 0 < size <= self._max_bytes
        }
        for i, answer in zip(commands, self._pool.ask([*commands.values()], deadline), strict=True):
            if not isinstance(answer, int):
                fault = self._pool.fault(answer)
                out[i] = Fault(fault.kind, f"not overwritten: {fault.detail}")
        return out

    def _steps(self) -> Iterator[list["_Found"]]:
        """All names of records in batches, each with the bytes of its value; 0 for what is no string."""
        pattern = b"".join(b"\\%c" % c if c in b"*?[]\\^-" else b"%c" % c for c in self._prefix) + b"[0-9a-f]" * 64
        seen: set[bytes] = set()  # a scan may name a key twice while the server grows its table
        cursor = b"0"
        while True:
            scan = command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % _SCANNED)
            (answer,) = self._pool.ask([scan], self._deadline())
            step = _scanned(answer)
            if step is None:
                if not self._pool.closed:
                    _log.warning("%s: not all of it was looked at: %s", self.name, self._pool.fault(answer))
                return
            cursor, found = step
            names = [name for name in dict.fromkeys(found) if name not in seen]
            seen.update(names)
            for start in range(0, len(names), _SCANNED):
                yield self._sized(names[start : start + _SCANNED])
            if cursor == b"0":
                return

    def _sized(self, names: Sequence[bytes]) -> list["_Found"]:
        sizes = self._pool.ask([command(b"STRLEN", name) for name in names], self._deadline())
        wrong_type = Refused("WRONGTYPE")
        return [
            _Found(name, size if isinstance(size, int) else 0)
            for name, size in zip(names, sizes, strict=True)
            if isinstance(size, int) or size == wrong_type
        ]

    def _heads(self, names: Sequence[bytes]) -> list[memoryview | Fault]:
        """The first bytes of each value, all of its header if it is a record; none of what is no string."""
        heads = self._first(names, HEAD_BYTES)
        short = [i for i, head in enumerate(heads) if not isinstance(head, Fault) and is_cut(head)]
        for i, head in zip(short, self._first([names[i] for i in short], MAX_HEAD_BYTES), strict=True):
            heads[i] = head
        return heads

    def _first(self, names: Sequence[bytes], num_bytes: int) -> list[memoryview | Fault]:
        commands = [command(b"GETRANGE", name, b"0", b"%d" % (num_bytes - 1)) for name in names]
        heads: list[memoryview | Fault] = []
        for answer in self._pool.ask(commands, self._deadline(), max_bytes=num_bytes):
            if answer == Refused("WRONGTYPE"):
                heads.append(fresh(0))
            else:
                heads.append(answer if isinstance(answer, memoryview) else self._pool.fault(answer))
        return heads


class _Found(NamedTuple):
    name: bytes
    num_bytes: int


def _overwrite(name: bytes, num_bytes: int) -> Command:
    zeros = [_ZEROS[: min(len(_ZEROS), num_bytes - start)] for start in range(0, num_bytes, len(_ZEROS))]
    return command_in_pieces([[b"SETRANGE"], [name], [b"0"], zeros])


def _scanned(answer: Answer | Fault) -> tuple[bytes, list[bytes]] | None:
    """Cursor and names of one step of a scan, or None if it is none."""
    if not isinstance(answer, list) or len(answer) != 2:
        return None
    cursor, names = answer
    if not isinstance(cursor, memoryview) or not isinstance(names, list):
        return None
    return bytes(cursor), [bytes(name) for name in names if isinstance(name, memoryview)]
