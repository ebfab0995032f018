"""A link between two tiers: work done on a thread of its own, never faster than the link may be."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kvwise.core.clock import Clock, MonotonicClock
from kvwise.tiers.pace import Pace

T = TypeVar("T")


class Link:
    """Runs transfers one after another in the background and counts their bytes.

    `bytes_per_second` throttles the link: a transfer of n bytes then takes at least n / bytes_per_second, measured
    from when the link became free. None is as fast as the machine moves the bytes.
    """

    def __init__(
        self,
        name: str,
        bytes_per_second: float | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.num_bytes = 0  # of the transfers begun
        self._clock = clock or MonotonicClock()
        self._pace = Pace(name, bytes_per_second, self._clock, sleep)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"kvwise-{name.replace(':', '-')}")

    @property
    def label(self) -> str:
        """Name and speed, for every output that shows figures which depend on it."""
        return self._pace.label

    def begin(self, transfer: Callable[[], T], num_bytes: int) -> "Future[T]":
        """Start a transfer of `num_bytes` bytes; the future ends when the bytes have arrived."""
        self.num_bytes += num_bytes
        return self._worker.submit(self._run, transfer, num_bytes)

    def _run(self, transfer: Callable[[], T], num_bytes: int) -> T:
        started = self._clock.now()
        result = transfer()
        self._pace.charge(num_bytes, started)
        return result

    def close(self) -> None:
        """Finish what has begun and end the thread."""
        self._worker.shutdown(wait=True)
