"""What a request says of its KV - who shares it, how much of it, for how long - as the engine understands it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.server.api.schema import GenerationRequest
from kvwise.server.errors import ApiError

KEY_SESSION = "key:"  # what names of sessions begin with that a prompt_cache_key makes
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 30 * 86400
# Of the deprecated field: the longest idle time, and the longest time altogether.
_RETENTION = {"in_memory": (600.0, 3600.0), "24h": (86400.0, 86400.0)}
_NAME_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Caching:
    """Who shares a request's KV and for how long; `explicit`: only what lies before a breakpoint is shared."""

    session: str  # as the tenant names it
    cache_salt: str
    ttl: Ttl
    explicit: bool

    def num_shareable(self, breakpoints: Sequence[int]) -> int | None:
        """Leading tokens of a prompt that may be looked up and published, with breakpoints behind so many tokens.

        None: all. Only full blocks are shared, so that a breakpoint is rounded down.
        """
        return max(breakpoints, default=0) if self.explicit else None


def caching(body: GenerationRequest, session_header: str | None) -> Caching:
    """The caching fields of a request; ApiError 400 for those that do not go together."""
    options = body.prompt_cache_options
    return Caching(
        _session(body, session_header),
        body.cache_salt or "",
        _ttl(None if options is None else options.ttl, body.prompt_cache_retention),
        options is not None and options.mode == "explicit",
    )


def session_header(request: Request) -> str | None:
    """The session that a request's head names; of several headers the list, which is no name."""
    found = request.headers.getlist("x-session-id")
    return ", ".join(found) if found else None


def _session(body: GenerationRequest, header: str | None) -> str:
    if header is not None and not _is_name(header):
        raise ApiError(400, f"X-Session-ID must be 1 to {_NAME_LENGTH} visible ASCII characters", param="X-Session-ID")
    if None not in (header, body.session_id) and header != body.session_id:
        raise ApiError(400, "session_id and the header X-Session-ID differ: send one of them", param="session_id")
    session = body.session_id or header
    if session is None:
        return "" if body.prompt_cache_key is None else f"{KEY_SESSION}{body.prompt_cache_key}"
    if session.startswith(KEY_SESSION):
        raise ApiError(
            400, f"session {session!r} begins with {KEY_SESSION!r}, which is for prompt_cache_key: choose another name",
            param="session_id",
        )  # fmt: skip
    return session


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _NAME_LENGTH and all("!" <= letter <= "~" for letter in text)


def _ttl(ttl: str | None, retention: str | None) -> Ttl:
    """A ttl counts from the latest hit, as OpenAI's does; retention is the most it may be."""
    idle = None if ttl is None else float(int(ttl[:-1]) * _UNITS[ttl[-1]])
    if idle is not None and idle > _LONGEST_S:
        raise ApiError(
            400, f"prompt_cache_options.ttl={ttl!r} is longer than 30d, the limit", param="prompt_cache_options.ttl"
        )
    if retention is None:
        return NO_TTL if idle is None else Ttl(idle_s=idle)
    most_idle, most = _RETENTION[retention]
    return Ttl(absolute_s=most, idle_s=most_idle if idle is None else min(idle, most_idle))
