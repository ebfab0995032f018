"""Sessions: who holds which keys over all tiers, so that closing frees nothing of others and purging frees the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from math import inf
from typing import NamedTuple

from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.clock import Clock
from kvwise.core.errors import UsageError

_MOST_CLOSED = 1000
_MOST_OPEN = 100_000
_CLOSED_AT_ONCE = 100  # a hundredth of the open ones leaves when there are too many


class SessionInfo(NamedTuple):
    """One session as a list shows it; `closes_at` is when it closes by itself if nobody uses it, in seconds."""

    session: str
    tenant: str
    is_open: bool
    num_keys: int
    num_running: int
    used_at: float
    closes_at: float


@dataclass(slots=True)
class _Session:
    tenant: str
    ttl: Ttl
    opened_at: float
    used_at: float
    is_open: bool = True
    keys: dict[bytes, bytes] = field(default_factory=dict)  # key -> its parent (b"": not told), in order of first use
    requests: set[str] = field(default_factory=set)

    @property
    def closes_at(self) -> float:
        """When it closes by itself; its idle time stands still while a request of it runs."""
        ends = inf if self.ttl.absolute_s is None else self.opened_at + self.ttl.absolute_s
        if self.ttl.idle_s is None or self.requests:
            return ends
        return min(ends, self.used_at + self.ttl.idle_s)


class Sessions:
    """Registry of who holds a key: open sessions, running requests, pins. It knows keys only, in whatever tier.

    A closed session holds nothing, but its keys are remembered, of the `max_closed` that closed last, so that it can
    still be purged. A session whose own time to live is over closes by itself; if more than `max_open` are open, those
    that have been idle for longest do. Not thread-safe.
    """

    def __init__(self, clock: Clock, *, max_closed: int = _MOST_CLOSED, max_open: int = _MOST_OPEN) -> None:
        self._clock = clock
        self._max_closed = max_closed
        self._max_open = max_open
        self._sessions: dict[str, _Session] = {}
        self._closed: dict[str, None] = {}  # first closed first
        self._holders: dict[bytes, set[str]] = {}
        self._requests: dict[str, tuple[str, list[bytes]]] = {}
        self._runs: dict[bytes, dict[str, int]] = {}  # key -> session ("": none) -> running requests
        self._pins: dict[bytes, float] = {}
        self._soonest = inf

    def open(self, session: str, tenant: str = "", ttl: Ttl = NO_TTL) -> None:
        """Open a session, or open it again: what it used before is its own again, under this `ttl`.

        UsageError for an empty name, or if another tenant owns the name.
        """
        now = self._close_due()
        if not session:
            raise UsageError("a session needs a name that is not empty")
        known = self._sessions.get(session)
        if known is None:
            self._sessions[session] = known = _Session(tenant, ttl, now, now)
        elif known.tenant != tenant:
            raise UsageError(f"session {session!r} belongs to another tenant: choose another name")
        elif not known.is_open:
            known.is_open, known.opened_at = True, now
            del self._closed[session]
        known.ttl, known.used_at = ttl, now
        self._soonest = min(self._soonest, known.closes_at)
        if len(self._sessions) - len(self._closed) > self._max_open:
            self._close_idle(session)

    def use(self, session: str, keys: Sequence[bytes], parent: bytes = b"") -> None:
        """The session matched or published `keys`, a run of one chain behind `parent`; its idle time starts anew.

        A closed one holds nothing by that, but remembers them for a purge. UsageError if it is unknown.
        """
        now = self._close_due()
        known = self._require(session)
        for before, key in zip([parent, *keys], keys, strict=False):
            known.keys[key] = before
            self._holders.setdefault(key, set()).add(session)
        self._slide(known, now)

    def running(self, request_id: str, keys: Sequence[bytes], session: str = "") -> None:
        """A request holds `keys` until it `ended`; said again, with more keys, it replaces what was said before.

        `session` is the one it belongs to, if any: it does not keep that session from being purged, and the session
        does not fall idle meanwhile.
        """
        self._close_due()
        known = self._require(session) if session else None
        self._forget_request(request_id)
        self._requests[request_id] = (session, list(dict.fromkeys(keys)))
        for key in self._requests[request_id][1]:
            count = self._runs.setdefault(key, {})
            count[session] = count.get(session, 0) + 1
        if known is not None:
            known.requests.add(request_id)

    def ended(self, request_id: str) -> None:
        """The request holds nothing any longer; no error if it never ran."""
        session = self._forget_request(request_id)
        known = self._sessions.get(session)
        if known is not None:
            self._slide(known, self._clock.now())
        self._close_due()

    def pin(self, keys: Iterable[bytes], until: float | None = None) -> None:
        """`keys` are pinned until `until` seconds (None: until `unpin`); of two pins the later deadline holds."""
        at = inf if until is None else until
        for key in keys:
            self._pins[key] = max(at, self._pins.get(key, at))

    def unpin(self, keys: Iterable[bytes]) -> None:
        """The pins of `keys` are over."""
        for key in keys:
            self._pins.pop(key, None)

    def close(self, session: str) -> None:
        """The session holds nothing any longer; what it stored stays until it leaves by itself."""
        self._close_due()
        self._close(session, self._require(session))

    def purge_list(self, session: str) -> tuple[list[bytes], list[bytes]]:
        """(keys to delete now, keys that stay because another live owner holds them), in order of first use.

        Live owners are other open sessions, running requests that are not its own, and pins. Changes nothing: say
        `forget` once they are deleted. UsageError if the session is unknown.
        """
        now = self._close_due()
        known = self._require(session)
        purge: list[bytes] = []
        shared: list[bytes] = []
        for key in known.keys:
            (shared if self._is_held(key, session, now) else purge).append(key)
        return purge, shared

    def links(self, session: str) -> dict[bytes, bytes]:
        """Key -> the key before it in its chain (b"": not told) of all that the session used; UsageError if unknown."""
        self._close_due()
        return dict(self._require(session).keys)

    def forget(self, keys: Iterable[bytes]) -> None:
        """`keys` left every tier: nobody holds them."""
        for key in keys:
            for session in self._holders.pop(key, ()):
                del self._sessions[session].keys[key]
            self._pins.pop(key, None)

    def sessions(self) -> list[SessionInfo]:
        """All sessions that are remembered, in the order they were first opened."""
        self._close_due()
        return [
            SessionInfo(name, s.tenant, s.is_open, len(s.keys), len(s.requests), s.used_at, s.closes_at)
            for name, s in self._sessions.items()
        ]

    def is_open(self, session: str) -> bool:
        """Whether it holds what it used."""
        self._close_due()
        known = self._sessions.get(session)
        return known is not None and known.is_open

    def tenant_of(self, session: str) -> str:
        """The session's tenant; UsageError if it is unknown."""
        return self._require(session).tenant

    def _require(self, session: str) -> _Session:
        known = self._sessions.get(session)
        if known is None:
            raise UsageError(f"unknown session {session!r}: it was never opened, or closed and forgotten since")
        return known

    def _is_held(self, key: bytes, session: str, now: float) -> bool:
        """Whether a live owner other than `session` holds `key`."""
        if any(name != session and self._sessions[name].is_open for name in self._holders.get(key, ())):
            return True
        if any(owner != session for owner in self._runs.get(key, ())):
            return True
        if key not in self._pins:
            return False
        if self._pins[key] > now:
            return True
        del self._pins[key]
        return False

    def _slide(self, known: _Session, now: float) -> None:
        if known.is_open:
            known.used_at = now
            self._soonest = min(self._soonest, known.closes_at)

    def _close(self, session: str, known: _Session) -> None:
        if not known.is_open:
            return
        known.is_open = False
        self._closed[session] = None
        while len(self._closed) > self._max_closed:
            oldest = next(iter(self._closed))
            del self._closed[oldest]
            self._drop(oldest)

    def _drop(self, session: str) -> None:
        for key in self._sessions.pop(session).keys:
            holders = self._holders[key]
            holders.discard(session)
            if not holders:
                del self._holders[key]

    def _close_idle(self, besides: str) -> None:
        """Close some of those that nobody has used for longest."""
        idle = [(s.used_at, name) for name, s in self._sessions.items() if s.is_open and not s.requests]
        for _, name in nsmallest(max(1, self._max_open // _CLOSED_AT_ONCE), idle):
            if name != besides:
                self._close(name, self._sessions[name])

    def _close_due(self) -> float:
        """Close the sessions whose time is over; the time now. O(1) if none is."""
        now = self._clock.now()
        if now >= self._soonest:
            for name, known in list(self._sessions.items()):
                if known.is_open and known.closes_at <= now:
                    self._close(name, known)
            self._soonest = min((s.closes_at for s in self._sessions.values() if s.is_open), default=inf)
        return now

    def _forget_request(self, request_id: str) -> str:
        """Drop what the request holds; the session it belongs to, "" if none."""
        session, keys = self._requests.pop(request_id, ("", []))
        if session in self._sessions:
            self._sessions[session].requests.discard(request_id)
        for key in keys:
            count = self._runs[key]
            count[session] -= 1
            if not count[session]:
                del count[session]
            if not count:
                del self._runs[key]
        return session
