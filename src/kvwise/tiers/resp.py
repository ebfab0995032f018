"""RESP2 over one socket and under one deadline: commands leave in pieces, large answers arrive where they shall lie.

redis-py makes the connection (TCP, TLS, Unix socket) but does not speak on it: its timeouts hold for each packet, so
that a server which sends a byte a second is never late, and its replies are fresh memory of any size the server says.
"""

import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from kvwise.tiers.base import Buffer, Fault, FaultKind

Place = Callable[[int], memoryview]  # a buffer of exactly so many bytes
Command = list[Buffer]  # the bytes of one command, in pieces

_INBOX_BYTES = 4096
_MAX_PIECES = 256  # of one system call; the limit of Linux is 1024
_SMALL = 4096  # pieces below this many bytes are copied together
_MAX_ITEMS = 1 << 16  # of one answer, arrays in arrays counted
_MAX_DEPTH = 2  # of arrays in arrays
_AHEAD = 16  # commands that are ahead of their answers
_AHEAD_BYTES = 2 << 20  # of answers: more of them only push each other out of the server's and our caches
_MAX_ITEM_BYTES = 1024  # of a string in an array


class Refused(NamedTuple):
    """An error that the server answered. `code` is its first word; the rest may quote arguments and is not kept."""

    code: str


Answer = memoryview | int | str | Refused | list["Answer"] | None


class WireError(Exception):
    """The connection is of no use any more. `fault` says why."""

    def __init__(self, kind: FaultKind, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail)


def command(*words: bytes) -> Command:
    """One command of short words."""
    return [b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])]


def command_in_pieces(words: Sequence[Sequence[Buffer]]) -> Command:
    """One command whose words are given in pieces. Large pieces are not copied."""
    out: Command = [b"*%d\r\n" % len(words)]
    for pieces in words:
        out.append(b"$%d\r\n" % sum(memoryview(piece).nbytes for piece in pieces))
        out += pieces
        out.append(b"\r\n")
    return _compact(out)


def fresh(num_bytes: int) -> memoryview:
    """A buffer of its own, for answers that are small."""
    return memoryview(bytearray(num_bytes))


class Wire:
    """One connection, used by one thread at a time. After a `WireError` it can only be closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline = 0.0
        self._ahead = _AHEAD
        # A timeout of Python's makes two system calls of each; Linux can keep the time itself.
        self._by_system = sys.platform == "linux" and not isinstance(sock, ssl.SSLSocket)
        sock.settimeout(None)
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._num_items = 0
        self._begin = self._end = 0  # what of the inbox is not used yet

    def exchange(
        self,
        commands: Sequence[Command],
        answers: list[Answer],
        *,
        deadline: float,
        max_bytes: int,
        place: Place = fresh,
    ) -> None:
        """Send the commands, some ahead of their answers, and append the answers in order.

        Strings of the answers lie where `place` says; one of more than `max_bytes` is refused before it is received.
        `deadline` is on `time.monotonic`. Raises WireError; the answers until then stand.
        """
        self._deadline = deadline
        sent = 0
        try:
            for index in range(len(commands)):
                if sent < len(commands) and sent - index <= self._ahead // 2:
                    until = min(len(commands), index + self._ahead)
                    self._send([piece for each in commands[sent:until] for piece in each])
                    sent = until
                self._num_items = 0
                answer = self._answer(place, max_bytes)
                answers.append(answer)
                if isinstance(answer, memoryview):
                    self._ahead = max(1, min(_AHEAD, _AHEAD_BYTES // max(1, len(answer))))
        except (TimeoutError, BlockingIOError):
            raise WireError(FaultKind.LATE, "no answer before the deadline") from None
        except OSError as error:
            raise WireError(FaultKind.IO_ERROR, type(error).__name__) from None

    def hang_up(self) -> None:
        """End a transfer that another thread waits for."""
        with suppress(OSError):  # it may be closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.hang_up()
        self._sock.close()

    # -- out

    def _send(self, pieces: Command) -> None:
        if isinstance(self._sock, ssl.SSLSocket):  # it encrypts one buffer at a time
            for piece in pieces:
                self._wait_at_most(socket.SO_SNDTIMEO)
                self._sock.sendall(piece)
            return
        first, views = 0, [memoryview(piece) for piece in pieces]
        while first < len(views):
            self._wait_at_most(socket.SO_SNDTIMEO)
            sent = self._sock.sendmsg(views[first : first + _MAX_PIECES])
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    # -- in

    def _answer(self, place: Place, max_bytes: int, depth: int = 0) -> Answer:
        line = self._line()
        kind, text = line[:1], line[1:]
        if kind == b"$":
            return self._string(_number(text), place, max_bytes)
        if kind == b":":
            return _number(text)
        if kind == b"+":
            return text.decode("ascii", "replace")
        if kind == b"-":
            return Refused(text.split(b" ", 1)[0].decode("ascii", "replace")[:32])
        if kind == b"*":
            return self._array(_number(text), depth + 1)
        raise WireError(FaultKind.CORRUPT, "what came back is no answer of Redis")

    def _array(self, count: int, depth: int) -> list[Answer] | None:
        if count < 0:
            return None
        self._num_items += count
        if self._num_items > _MAX_ITEMS or depth > _MAX_DEPTH:
            raise WireError(FaultKind.CORRUPT, f"an answer of {self._num_items} items, {depth} deep")
        return [self._answer(fresh, _MAX_ITEM_BYTES, depth) for _ in range(count)]

    def _string(self, length: int, place: Place, max_bytes: int) -> memoryview | None:
        if length < 0:
            return None
        if length > max_bytes:
            raise WireError(FaultKind.CORRUPT, f"an answer of {length} bytes, more than {max_bytes}")
        target = place(length)
        got = min(length, self._end - self._begin)
        target[:got] = self._inbox[self._begin : self._begin + got]
        self._begin += got
        while got < length:
            got += self._receive(target[got:])
        if self._line():
            raise WireError(FaultKind.CORRUPT, "a string is longer than it says")
        return target

    def _line(self) -> bytes:
        """The next line without its end."""
        searched = 0
        while True:
            waiting = self._inbox[self._begin : self._end].tobytes()
            end = waiting.find(b"\r\n", searched)
            if end >= 0:
                self._begin += end + 2
                return waiting[:end]
            searched = max(len(waiting) - 1, 0)
            self._fill()

    def _fill(self) -> None:
        """Receive at least one byte into the inbox."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end == len(self._inbox):
            if self._begin == 0:
                raise WireError(FaultKind.CORRUPT, f"a line of more than {_INBOX_BYTES} bytes")
            rest = self._inbox[self._begin : self._end].tobytes()
            self._inbox[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        self._end += self._receive(self._inbox[self._end :])

    def _receive(self, target: memoryview) -> int:
        self._wait_at_most(socket.SO_RCVTIMEO)
        received = self._sock.recv_into(target)
        if received == 0:
            raise WireError(FaultKind.IO_ERROR, "the server closed the connection")
        return received

    def _wait_at_most(self, way: int) -> None:
        """Let the next call of the socket take no longer than the deadline; `way` is one of its SO_..TIMEO."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise WireError(FaultKind.LATE, "no answer before the deadline")
        if self._by_system:
            microseconds = max(1, int(left * 1e6))  # 0 would be for ever
            self._sock.setsockopt(socket.SOL_SOCKET, way, struct.pack("@ll", *divmod(microseconds, 1_000_000)))
        else:
            self._sock.settimeout(left)


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise WireError(FaultKind.CORRUPT, "a length that is no number") from None


def _compact(pieces: Command) -> Command:
    """The same bytes, runs of small pieces joined; every piece flat and not empty."""
    out: Command = []
    small: list[Buffer] = []
    for piece in pieces:
        if memoryview(piece).nbytes < _SMALL:
            small.append(piece)
            continue
        if small:
            out.append(b"".join(small))
            small = []
        out.append(memoryview(piece).cast("B"))
    if small:
        out.append(b"".join(small))
    return [piece for piece in out if len(piece)]
