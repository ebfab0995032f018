"""How blocks are named at rest: record keys, tags of owners, and deadlines that mean something after a restart."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from kvwise.cache.residency import Entry
from kvwise.cache.terms import Terms
from kvwise.core.clock import Clock
from kvwise.tiers.record import NO_TAG, Header


def record_key(key: bytes, spec: str, num_levels: int) -> bytes:
    """The 32-byte key of a block's record at one codec level: the block's own, where there is one level only."""
    return key if num_levels == 1 else hashlib.sha256(key + spec.encode("ascii")).digest()


def tag(name: str) -> bytes:
    """16 bytes that stand for a tenant or session in a record: the name itself is never written down."""
    return hashlib.sha256(b"kvwise owner\x00" + name.encode()).digest()[:16] if name else NO_TAG


def tag_text(name: str) -> str:
    """The tag as it stands in the books of tiers: 32 hex digits, or "" for nobody."""
    return tag(name).hex() if name else ""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Between the injected clock, which deadlines are kept on, and the wall clock, which outlives the process.

    The wall clock is read once: a later jump of it changes nothing here.
    """

    clock: Clock
    offset: float  # wall time less the clock's

    @classmethod
    def start(cls, clock: Clock, wall: Callable[[], float] = time.time) -> "Deadlines":
        """Read both clocks now."""
        return cls(clock, wall() - clock.now())

    def wall(self) -> float:
        """Unix seconds."""
        return self.clock.now() + self.offset

    def header_times(self, terms: Terms) -> tuple[float, float, float]:
        """(stored_at, expires_at, idle_s) of a record that is written now under `terms`."""
        expires = terms.expires_at + self.offset if terms.expires_at < inf else inf
        return self.wall(), expires, terms.idle_s

    def entry(self, header: Header) -> Entry:
        """The entry of a record found at start. Hits of a former process are not known, so idle time counts from when
        it was stored; a record from the future (the wall clock was set back) lives no longer than it was given.
        """
        now = self.wall()
        end = min(header.expires_at, header.stored_at + header.idle_s)
        left = min(end - now, end - header.stored_at) if end < inf else inf
        terms = Terms(
            expires_at=self.clock.now() + left,
            tenant="" if header.tenant == NO_TAG else header.tenant.hex(),
            session="" if header.session == NO_TAG else header.session.hex(),
        )
        return Entry(header.key, header.record_bytes, header.depth, terms)
