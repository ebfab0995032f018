"""Times to live as a caller states them, and which of several statements holds."""

from dataclasses import dataclass
from math import inf

from kvwise.cache.terms import Terms
from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Ttl:
    """How long KV may be found: `absolute_s` seconds from when it was stored, `idle_s` seconds from the latest hit.

    None: not stated, so that the next less specific statement holds. Infinity: stated to be without limit.
    """

    absolute_s: float | None = None
    idle_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("absolute_s", self.absolute_s), ("idle_s", self.idle_s)):
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value}: a time to live must be more than 0 seconds (leave it out for none)")

    def terms(self, now: float, *, tenant: str = "", session: str = "") -> Terms:
        """The terms of what `tenant` stores at `now` seconds in `session`."""
        ends = inf if self.absolute_s is None else now + self.absolute_s
        return Terms(ends, inf if self.idle_s is None else self.idle_s, tenant, session)


NO_TTL = Ttl()


def resolve(
    request: Ttl | None = None, session: Ttl | None = None, tenant: Ttl | None = None, default: Ttl | None = None
) -> Ttl:
    """What holds for a request: of each time the most specific that is stated, at most the tenant's."""
    stated = [ttl or NO_TTL for ttl in (request, session, tenant, default)]
    most = tenant or NO_TTL
    return Ttl(
        _first([ttl.absolute_s for ttl in stated], most.absolute_s), _first([ttl.idle_s for ttl in stated], most.idle_s)
    )


def _first(stated: list[float | None], most: float | None) -> float | None:
    seconds = next((value for value in stated if value is not None), None)
    return seconds if seconds is None or most is None else min(seconds, most)
