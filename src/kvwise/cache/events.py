"""What happened to published blocks, for routers, lower tiers and the log; fields follow vLLM's KV events."""

from collections import deque
from typing import NamedTuple

from kvwise.cache.misses import RemovalReason


class BlocksStored(NamedTuple):
    """Blocks became matchable; `parents[i]` is the key before `keys[i]` in its chain, or the chain's root."""

    at: float
    keys: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    blocks: tuple[int, ...]


class BlocksRemoved(NamedTuple):
    """Blocks are no longer matchable."""

    at: float
    keys: tuple[bytes, ...]
    blocks: tuple[int, ...]
    reason: RemovalReason


class AllBlocksCleared(NamedTuple):
    """The whole index was emptied."""

    at: float


Event = BlocksStored | BlocksRemoved | AllBlocksCleared


class EventLog:
    """The last `capacity` events until somebody drains them; what overflowed is counted, never silent."""

    def __init__(self, capacity: int) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)
        self.num_lost = 0

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: Event) -> None:
        """Add an event; the oldest falls out of a full log."""
        if len(self._events) == self._events.maxlen:
            self.num_lost += 1
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Return and forget all events, oldest first."""
        events = list(self._events)
        self._events.clear()
        return events
