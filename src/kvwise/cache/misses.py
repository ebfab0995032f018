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
    PURGED = "purged"  # its session, tenant or prefix was deleted on demand
    TIER_FAULT = "tier fault"  # its tier did not give it back
    CORRUPT = "corrupt"  # its bytes came back wrong
    DECLINED = "load declined"  # it is in a lower tier, but computing it was held to be faster
    OTHER_SALT = "other salt"  # for the operator only: a tenant must not learn what another one stores
    OTHER_MODEL = "other model or dtype"  # or revision, encoding, positions: these tokens are stored under another one
    BLOCK_BOUNDARY = "block boundary"  # all that may be matched were found; the rest is computed


class RemovalReason(StrEnum):
    """Why a block left an index; every one is a miss reason of the same name."""

    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    WITHDRAWN = "withdrawn"
    PURGED = "purged"
    TIER_FAULT = "tier fault"
    CORRUPT = "corrupt"


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

    def explain(self, key: bytes, block_index: int, policy: str) -> Miss | None:
        """The miss that the last departure of `key` explains, if remembered; `policy` is who evicts here."""
        departure = self._departed.get(key)
        if departure is None:
            return None
        reason, at = departure
        return Miss(MissReason(reason), block_index, policy if reason is RemovalReason.EVICTED else None, at)
