"""Time as a value that is handed in, so that tests and the simulator can own it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never run backwards; the zero is arbitrary."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...


class MonotonicClock:
    """The machine's monotonic clock: a change of the wall clock does not touch it."""

    def now(self) -> float:
        """Seconds since some fixed moment of this boot."""
        return time.perf_counter()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Seconds advanced so far, plus the start."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move time forward by `seconds` (>= 0)."""
        if seconds < 0:
            raise ValueError(f"a clock cannot run backwards: advance({seconds})")
        self._now += seconds
