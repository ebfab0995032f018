"""A breaker: a tier that fails again and again is left alone for a while, so that no request waits for it."""

import logging
from enum import StrEnum
from threading import Lock

from kvwise.core.clock import Clock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Fault, FaultKind

_log = logging.getLogger(__name__)


class BreakerState(StrEnum):
    """Whether a tier may be used."""

    CLOSED = "closed"  # yes
    OPEN = "open"  # not before its back-off is over
    HALF_OPEN = "half-open"  # one caller finds out


class Breaker:
    """Opens after `max_failures` failures in a row, lets one probe through after a back-off, closes when it succeeds.

    ```
    closed --max_failures in a row--> open --back-off over, allows()--> half-open --success--> closed
                                        ^                                   |
                                        +------ failure: back-off doubled --+
    ```

    I/O errors and missed deadlines are failures. A corrupt record is one only right after another corrupt one: a
    single bad record says little about its medium. A medium that says "not there", "foreign" or "full" answers: that
    is no failure, and enough to close a half-open breaker. The back-off starts at `backoff_s` seconds of `clock` and
    doubles up to `max_backoff_s`. May be used from several threads at once.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        max_failures: int = 3,
        backoff_s: float = 1.0,
        max_backoff_s: float = 60.0,
    ) -> None:
        if max_failures < 1 or not 0 < backoff_s <= max_backoff_s:
            raise UsageError(
                f"breaker of {name}: max_failures={max_failures} must be at least 1, and 0 < backoff_s={backoff_s:g}"
                f" <= max_backoff_s={max_backoff_s:g}"
            )
        self.name = name
        self.max_failures = max_failures
        self.num_opened = 0  # times it went from closed or half-open to open
        self.num_failures = 0  # failures that counted
        self.num_refused = 0  # calls that were not allowed
        self._clock = clock
        self._first_backoff_s, self._max_backoff_s = backoff_s, max_backoff_s
        self._backoff_s = backoff_s
        self._state = BreakerState.CLOSED
        self._row = 0  # failures since the last success
        self._after_corrupt = False
        self._until = 0.0  # open: when a probe may go; half-open: when the probe counts as lost
        self._mutex = Lock()

    @property
    def state(self) -> BreakerState:
        """The state now; an open breaker turns half-open only when somebody asks `allows`."""
        return self._state

    def allows(self) -> bool:
        """Whether the tier may be used now. True while it is not closed makes the caller the probe.

        The probe reports by `success` or `failure`; one that does neither for a whole back-off counts as lost.
        """
        if self.state is BreakerState.CLOSED:  # the way of every call: one load, no lock
            return True
        with self._mutex:
            if self._state is BreakerState.CLOSED:
                return True
            now = self._clock.now()
            if now < self._until:
                self.num_refused += 1
                return False
            self._until = now + self._backoff_s
            if self._state is BreakerState.OPEN:
                self._state = BreakerState.HALF_OPEN
                _log.info("tier %s: breaker half-open, one probe goes out", self.name)
            return True

    def success(self) -> None:
        """The tier did what it was asked to."""
        with self._mutex:
            self._after_corrupt = False
            self._answered()

    def failure(self, fault: Fault) -> None:
        """The tier answered with `fault`; what it says of the medium depends on its kind."""
        with self._mutex:
            if fault.kind in (FaultKind.IO_ERROR, FaultKind.LATE):
                self._failed(fault)
            elif fault.kind is FaultKind.CORRUPT:
                again, self._after_corrupt = self._after_corrupt, True
                if again or self._state is BreakerState.HALF_OPEN:
                    self._failed(fault)
            elif fault.kind is not FaultKind.OFF:  # OFF: nobody asked the medium
                self._answered()

    def _answered(self) -> None:
        if self._state is BreakerState.OPEN:
            return  # begun before it opened: tells nothing of now
        self._row = 0
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.CLOSED
            self._backoff_s = self._first_backoff_s
            _log.warning("tier %s: breaker closed, the tier is used again", self.name)

    def _failed(self, fault: Fault) -> None:
        self.num_failures += 1
        if self._state is BreakerState.OPEN:
            return
        self._row += 1
        probe = self._state is BreakerState.HALF_OPEN
        if not probe and self._row < self.max_failures:
            return
        if probe:
            self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
        self._state = BreakerState.OPEN
        self._until = self._clock.now() + self._backoff_s
        self.num_opened += 1
        _log.warning(
            "tier %s: breaker open for %g s after %d failures in a row, last %s",
            self.name, self._backoff_s, self._row, fault,
        )  # fmt: skip
