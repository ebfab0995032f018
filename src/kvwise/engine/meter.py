"""What a step costs: the time it took, made longer where an engine may use only a share of the device."""

import time
from collections.abc import Callable
from typing import Protocol

from kvwise.core.clock import VirtualClock


class Meter(Protocol):
    """Told of every step, after it ran."""

    def charge(self, num_tokens: int, context: int, seconds: float) -> None:
        """A step of `num_tokens` tokens that attend to `context` tokens each, on average, took `seconds`."""
        ...


class ShareMeter:
    """Sleeps after each step as long as others would have had the device: a stand-in for tenants that are not there."""

    def __init__(self, share: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._share = share
        self._sleep = sleep

    def charge(self, num_tokens: int, context: int, seconds: float) -> None:
        """Wait for the others' turn."""
        if self._share < 1:
            self._sleep(seconds * (1 / self._share - 1))


class VirtualMeter:
    """Moves a virtual clock by what a step is said to cost; what it really took does not count."""

    def __init__(self, clock: VirtualClock, seconds: Callable[[int, int], float]) -> None:
        self._clock = clock
        self._seconds = seconds

    def charge(self, num_tokens: int, context: int, seconds: float) -> None:
        """Let the clock run."""
        self._clock.advance(self._seconds(num_tokens, context))
