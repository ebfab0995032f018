"""Why a look-up went no further: every miss carries a reason."""

from collections import Counter, OrderedDict
from dataclasses import dataclass
from enum import StrEnum


class MissReason(StrEnum):
    """What stopped the leading run of hits."""

    SHARING_OFF = "sharing off"
    NEVER_STORED = "never stored"  # or so long ago that the ledger forgot
    PENDING = "being computed"
    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    WITHDRAWN = "withdrawn"  # its only holder rewrote it in place, for lack of room
    OTHER_SALT = "other salt"  # for the operator only: a tenant must not learn what another one stores
    BLOCK_BOUNDARY = "block boundary"  # all full blocks were found; the rest is computed


class RemovalReason(StrEnum):
    """Why a published block left the index."""

    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class Miss:
    """The first block not found: its index in the prompt, the reason, and who took it when."""

    reason: MissReason
    block_index: int
    policy: str | None = None
    at: float | None = None

    def __str__(self) -> str:
        by = f" by {self.policy}" if self.policy else ""
        when = f" at {self.at:.3f} s" if self.at is not None else ""
        return f"block {self.block_index}: {self.reason}{by}{when}"


class Ledger:
    """Remembers the last `capacity` keys that left, and counts misses by reason."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._departed: OrderedDict[bytes, tuple[RemovalReason, float]] = OrderedDict()
        self.counts: Counter[MissReason] = Counter()

    def note(self, keys: list[bytes], reason: RemovalReason, at: float) -> None:
        """Remember that `keys` left for `reason` at `at` seconds."""
        departed, why = self._departed, (reason, at)
        for key in keys:
            departed.pop(key, None)
            departed[key] = why
        while len(departed) > self._capacity:
            departed.popitem(last=False)

    def departure(self, key: bytes) -> tuple[RemovalReason, float] | None:
        """Why and when `key` last left, if remembered."""
        return self._departed.get(key)
