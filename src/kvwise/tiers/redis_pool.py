"""Connections to one Redis server: made by redis-py, greeted, used by one thread at a time, replaced when dead."""

import logging
import time
from collections.abc import Sequence
from threading import Lock
from typing import Any

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Fault, FaultKind
from kvwise.tiers.resp import Answer, Command, Place, Refused, Wire, WireError, command, fresh

_log = logging.getLogger(__name__)

_IDLE = 8  # connections kept for the next call
_URL = "redis://[user:password@]host[:port][/db], rediss://... (TLS) or unix://[user:password@]path[?db=...]"

# What the server may say instead of doing it, and what the operator can do about it.
_REFUSALS = {
    "OOM": (FaultKind.FULL, "it is out of memory: raise maxmemory, or let it evict (maxmemory-policy allkeys-lru)"),
    "READONLY": (FaultKind.FULL, "it is a read-only replica: name the primary in the URL"),
    "MISCONF": (FaultKind.FULL, "it cannot write its snapshot and takes no writes: see its log"),
    "NOAUTH": (FaultKind.IO_ERROR, "it wants a password: put it into the URL"),
    "WRONGPASS": (FaultKind.IO_ERROR, "user or password is wrong"),
    "NOPERM": (FaultKind.IO_ERROR, "the user needs GETRANGE, SET, SETRANGE, STRLEN, EXISTS, DEL, SCAN on the prefix"),
    "LOADING": (FaultKind.IO_ERROR, "it is loading its data set"),
    "WRONGTYPE": (FaultKind.CORRUPT, "a key of the prefix holds no string: something else writes there"),
}


class RedisPool:
    """Asks one server. As many connections as threads ask at once, opened when needed; a few stay open."""

    def __init__(self, url: str, name: str) -> None:
        self._name = name
        self._dial = _Dial(url, name)
        self._idle: list[Wire] = []
        self._busy: set[Wire] = set()
        self._closed = False
        self._said: set[str] = set()
        self._mutex = Lock()

    @property
    def place(self) -> str:
        """Host and port, or the path of the socket."""
        return self._dial.place

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def ask(
        self, commands: Sequence[Command], deadline: float, *, max_bytes: int = 1024, place: Place = fresh
    ) -> list[Answer | Fault]:
        """One answer for each command; from where the connection failed on, the fault.

        `deadline` is on `time.monotonic`; `max_bytes` and `place` are as in `Wire.exchange`. All commands must be such
        that they may be done twice: a connection that was used before and breaks is replaced once.
        """
        answers: list[Answer] = []
        fault = Fault(FaultKind.IO_ERROR)
        for _ in range(2):
            if len(answers) == len(commands):
                break
            wire, used = None, False
            try:
                wire, used = self._take(deadline)
                rest = commands[len(answers) :]
                wire.exchange(rest, answers, deadline=deadline, max_bytes=max_bytes, place=place)
                self._put_back(wire)
            except WireError as error:
                fault = error.fault
                if wire is not None:
                    self._drop(wire)
                if not (used and fault.kind is FaultKind.IO_ERROR):
                    break
                # Most likely the server was started again since.
        if self._closed:
            return [self.off()] * len(commands)
        return [*answers, *[fault] * (len(commands) - len(answers))]

    def fault(self, answer: Answer | Fault) -> Fault:
        """What an answer that is not the one hoped for means. Each kind of refusal is said once in the log."""
        if isinstance(answer, Fault):
            return answer
        if not isinstance(answer, Refused):
            return Fault(FaultKind.CORRUPT, f"an answer of another kind: {type(answer).__name__}")
        kind, meaning = _REFUSALS.get(answer.code, (FaultKind.IO_ERROR, "its log may tell why"))
        with self._mutex:
            new = answer.code not in self._said and len(self._said) < 64
            if new:
                self._said.add(answer.code)
        if new:
            _log.warning("%s: %s refuses with %s: %s", self._name, self.place, answer.code, meaning)
        return Fault(kind, f"refused: {answer.code}")

    def close(self) -> None:
        """Hang up; calls under way end with OFF, and so do later ones."""
        with self._mutex:
            self._closed = True
            for wire in self._busy:
                wire.hang_up()
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _take(self, deadline: float) -> tuple[Wire, bool]:
        """A connection, and whether it has been used before."""
        with self._mutex:
            if self._closed:
                raise WireError(FaultKind.OFF, "closed")
            if self._idle:
                wire = self._idle.pop()
                self._busy.add(wire)
                return wire, True
        wire = self._dial(deadline)
        with self._mutex:
            self._busy.add(wire)
        try:
            for refused in self._dial.greet(wire, deadline):
                fault = self.fault(refused)
                raise WireError(fault.kind, fault.detail)
        except WireError:
            self._drop(wire)
            raise
        return wire, False

    def _put_back(self, wire: Wire) -> None:
        with self._mutex:
            self._busy.discard(wire)
            if not self._closed and len(self._idle) < _IDLE:
                self._idle.append(wire)
                return
        wire.close()

    def _drop(self, wire: Wire) -> None:
        """Close a connection that broke, and the idle ones: whatever broke it has hardly spared them."""
        with self._mutex:
            self._busy.discard(wire)
            idle, self._idle = self._idle, []
        for each in (wire, *idle):
            each.close()

    def off(self) -> Fault:
        """What a closed pool answers."""
        return Fault(FaultKind.OFF, f"{self._name} is closed")


class _Dial:
    """Opens connections to the server of a URL. Prints nothing of it but `place`."""

    def __init__(self, url: str, name: str) -> None:
        try:
            from redis import connection
            from redis.exceptions import RedisError
        except ImportError:
            raise UsageError(f"{name}: redis-py is not installed: pip install 'kvwise[redis]'") from None
        try:
            options: dict[str, Any] = connection.parse_url(url)  # type: ignore[no-untyped-call]
            self._kind: Any = options.pop("connection_class", connection.Connection)
            probe = self._kind(**options)
        except (ValueError, TypeError, RedisError):
            raise UsageError(f"{name}: its URL, or an option in it, is none that redis-py takes: use {_URL}") from None
        if timeouts := {"socket_timeout", "socket_connect_timeout"} & options.keys():
            raise UsageError(f"{name}: {' and '.join(sorted(timeouts))} in its URL: set timeout_s of the tier instead")
        self.place = f"{probe.host}:{probe.port}" if hasattr(probe, "port") else str(probe.path)
        self._options = options

    def __call__(self, deadline: float) -> Wire:
        """A connection that nothing was said on yet."""
        from redis.exceptions import RedisError, TimeoutError

        left = deadline - time.monotonic()
        if left <= 0:
            raise WireError(FaultKind.LATE, "no connection before the deadline")
        timeouts = {"socket_timeout": left, "socket_connect_timeout": left}
        connection = self._kind(**self._options, **timeouts, redis_connect_func=_say_nothing)
        try:
            connection.connect()
        except TimeoutError:
            raise WireError(FaultKind.LATE, f"no connection to {self.place} before the deadline") from None
        except (RedisError, OSError, ValueError) as error:
            cause = error.__context__ or error
            raise WireError(FaultKind.IO_ERROR, f"no connection to {self.place}: {type(cause).__name__}") from None
        # The wire owns the socket from here on; left in place, redis-py would close it when the connection is freed.
        sock, connection._sock = connection._sock, None
        return Wire(sock)

    def greet(self, wire: Wire, deadline: float) -> list[Refused]:
        """Log in and choose the database, as the URL says; what was refused of that."""
        options = self._options
        commands = []
        if options.get("password") or options.get("username"):
            user = [options["username"].encode()] if options.get("username") else []
            commands.append(command(b"AUTH", *user, (options.get("password") or "").encode()))
        if options.get("client_name"):
            commands.append(command(b"CLIENT", b"SETNAME", options["client_name"].encode()))
        if options.get("db"):
            commands.append(command(b"SELECT", b"%d" % int(options["db"])))
        answers: list[Answer] = []
        wire.exchange(commands, answers, deadline=deadline, max_bytes=1024)
        return [answer for answer in answers if isinstance(answer, Refused)]


def _say_nothing(_connection: object) -> None:
    """Instead of redis-py's greeting, which has no deadline."""
