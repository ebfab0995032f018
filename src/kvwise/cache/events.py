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
    """The last events until somebody drains them; what overflowed is counted, never silent.

    They name at most `capacity` blocks together (one that names none counts as one), or there is a single event.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._num_named = 0
        self.num_lost = 0

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: Event) -> None:
        """Add an event; the oldest fall out of a full log."""
        self._events.append(event)
        self._num_named += _num_named(event)
        while self._num_named > self._capacity and len(self._events) > 1:
            self._num_named -= _num_named(self._events.popleft())
            self.num_lost += 1

    def drain(self) -> list[Event]:
        """Return and forget all events, oldest first."""
        events = list(self._events)
        self._events.clear()
        self._num_named = 0
        return events


def _num_named(event: Event) -> int:
    return 1 if isinstance(event, AllBlocksCleared) else max(1, len(event.keys))
