"""Who runs the I/O side of loads: a thread for each, or a virtual clock."""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from kvwise.core.clock import Clock, VirtualClock
from kvwise.engine.hierarchy.load import Load
from kvwise.engine.hierarchy.rates import Rates
from kvwise.methods.loading.base import Chunk
from kvwise.tiers.base import Fault, FaultKind

_log = logging.getLogger(__name__)


class Driver(Protocol):
    """Carries loads on. `queued_s` seconds of transfers are ahead of a new load on a tier's link."""

    def start(self, load: Load) -> None:
        """Begin the I/O of a load."""
        ...

    def poll(self) -> None:
        """Catch up with the clock. Called before each step."""
        ...

    def wait(self, loads: list[Load], timeout_s: float) -> None:
        """Nothing can be computed now: come back when one of `loads` has news, at the latest after `timeout_s`."""
        ...

    def queued_s(self, tier: str) -> float:
        """Seconds of transfers that a new load on this tier's link waits for."""
        ...


class ThreadDriver:
    """A daemon thread for each load: one that hangs in the kernel or the network holds up nobody else."""

    def __init__(self, rates: Rates, clock: Clock) -> None:
        self._rates = rates
        self._clock = clock
        self._waiting: dict[Load, dict[str, int]] = {}  # bytes still to come, by tier
        self._mutex = threading.Lock()

    def start(self, load: Load) -> None:
        """Start its thread."""
        threading.Thread(target=self._run, args=(load,), name="kvwise-load", daemon=True).start()

    def _run(self, load: Load) -> None:
        try:
            while (chunk := load.next_chunk()) is not None:
                sizes = load.chunk_bytes(chunk)
                with self._mutex:
                    self._waiting[load] = sizes
                began = self._clock.now()
                num_bytes = load.fetch(chunk)
                seconds = self._clock.now() - began
                if num_bytes and len(sizes) == 1:
                    self._rates.link(next(iter(sizes))).observe(num_bytes, seconds)
                load.note(chunk, num_bytes, seconds)
        except Exception as error:  # a method or a store is somebody's code: only this load ends
            _log.exception("a load ended by an error")
            load.abandon(Fault(FaultKind.IO_ERROR, type(error).__name__))
        finally:
            with self._mutex:
                self._waiting.pop(load, None)
            load.end()

    def poll(self) -> None:
        """Threads need no help."""

    def wait(self, loads: list[Load], timeout_s: float) -> None:
        """Wait for news of the first: with several, the others' news come with the next step."""
        if loads:
            with loads[0].news:
                loads[0].news.wait(timeout_s)

    def queued_s(self, tier: str) -> float:
        """Chunks under way on this link, at its measured speed."""
        with self._mutex:
            num_bytes = sum(sizes.get(tier, 0) for sizes in self._waiting.values())
        return (self._rates.link(tier).seconds(num_bytes) or 0.0) if num_bytes else 0.0


class VirtualDriver:
    """Transfers that take `seconds(tier, bytes)` of a virtual clock, one after another on each tier's link.

    The bytes really move, and are really verified, at the moment they are due.
    """

    def __init__(self, clock: VirtualClock, seconds: Callable[[str, int], float], rates: Rates) -> None:
        self._clock = clock
        self._seconds = seconds
        self._rates = rates
        self._free_at: dict[str, float] = {}
        self._under_way: list[tuple[float, float, str, Load, Chunk]] = []  # due, begun, tier, load, chunk

    def start(self, load: Load) -> None:
        """Begin its first chunk."""
        self._next(load, self._clock.now())

    def _next(self, load: Load, now: float) -> None:
        chunk = load.next_chunk()
        if chunk is None:
            load.end()
            return
        sizes = load.chunk_bytes(chunk) or {"": 0}
        due = begun = now
        for tier, num_bytes in sizes.items():
            begun = max(now, self._free_at.get(tier, 0.0))
            due = max(due, begun + self._seconds(tier, num_bytes))
            self._free_at[tier] = due
        self._under_way.append((due, begun, next(iter(sizes)), load, chunk))

    def poll(self) -> None:
        """Carry out what is due by now, in order."""
        while self._under_way:
            first = min(self._under_way, key=lambda item: item[0])
            due, begun, tier, load, chunk = first
            if due > self._clock.now():
                return
            self._under_way.remove(first)
            num_bytes = load.fetch(chunk)
            if num_bytes:
                self._rates.link(tier).observe(num_bytes, due - begun)
            load.note(chunk, num_bytes, due - begun)
            self._next(load, due)

    def wait(self, loads: list[Load], timeout_s: float) -> None:
        """Let the clock run to the next arrival, or for `timeout_s`."""
        due = min((item[0] for item in self._under_way), default=self._clock.now() + timeout_s)
        self._clock.advance(max(0.0, min(due - self._clock.now(), timeout_s)))

    def queued_s(self, tier: str) -> float:
        """Until the link is free."""
        return max(0.0, self._free_at.get(tier, 0.0) - self._clock.now())
