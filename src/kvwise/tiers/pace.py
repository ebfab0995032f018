"""The pace of a link: transfers never end before a link of the stated speed could have ended them."""

import threading
import time
from collections.abc import Callable

from kvwise.core.clock import Clock, MonotonicClock


class Pace:
    """Shared by all who move bytes over one link in one direction; first come, first served. Thread-safe.

    `bytes_per_second` None is as fast as the machine moves the bytes.
    """

    def __init__(
        self,
        name: str,
        bytes_per_second: float | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.bytes_per_second = bytes_per_second
        self.num_bytes = 0
        self._clock = clock or MonotonicClock()
        self._sleep = sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """Name and speed, for every output that shows figures which depend on it."""
        if self.bytes_per_second is None:
            return f"{self.name} (not throttled)"
        return f"{self.name} throttled to {self.bytes_per_second / 1e9:g} GB/s"

    def charge(self, num_bytes: int, started: float) -> None:
        """Count bytes whose transfer began at `started`, and wait until the link would have delivered them."""
        with self._lock:
            self.num_bytes += num_bytes
            if self.bytes_per_second is None:
                return
            self._free_at = max(self._free_at, started) + num_bytes / self.bytes_per_second
            wait = self._free_at - self._clock.now()
        if wait > 0:
            self._sleep(wait)
