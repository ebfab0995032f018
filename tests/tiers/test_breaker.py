"""A breaker opens after failures in a row, tries again one call at a time, and waits longer each time that fails."""

import logging
import threading

import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Fault, FaultKind
from kvwise.tiers.breaker import Breaker, BreakerState

IO_ERROR, LATE = Fault(FaultKind.IO_ERROR, "no route"), Fault(FaultKind.LATE)
CORRUPT, MISSING = Fault(FaultKind.CORRUPT), Fault(FaultKind.MISSING)


def make(**settings: float) -> tuple[Breaker, VirtualClock]:
    clock = VirtualClock(100.0)
    return Breaker("redis", clock, **settings), clock  # type: ignore[arg-type]


def fail(breaker: Breaker, *faults: Fault) -> None:
    for fault in faults:
        breaker.failure(fault)


def opened(**settings: float) -> tuple[Breaker, VirtualClock]:
    breaker, clock = make(**settings)
    fail(breaker, *[IO_ERROR] * breaker.max_failures)
    assert breaker.state is BreakerState.OPEN
    return breaker, clock


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker, _ = make(max_failures=3)
    fail(breaker, IO_ERROR, LATE)
    assert breaker.allows()
    breaker.success()
    fail(breaker, LATE, LATE)
    assert breaker.allows()
    fail(breaker, LATE)
    assert not breaker.allows()
    assert (breaker.num_opened, breaker.num_failures, breaker.num_refused) == (1, 5, 1)


@pytest.mark.parametrize("kind", [FaultKind.MISSING, FaultKind.FOREIGN, FaultKind.FULL])
def test_a_medium_that_answers_is_no_failure(kind: FaultKind) -> None:
    breaker, _ = make(max_failures=1)
    fail(breaker, *[Fault(kind)] * 20)
    assert breaker.allows()
    assert breaker.num_failures == 0


def test_off_says_nothing_of_the_medium() -> None:
    breaker, _ = make(max_failures=2)
    fail(breaker, IO_ERROR, Fault(FaultKind.OFF), IO_ERROR)
    assert not breaker.allows()


def test_one_corrupt_record_is_no_failure_but_one_after_another_is() -> None:
    breaker, _ = make(max_failures=3)
    for _ in range(10):
        fail(breaker, CORRUPT)
        breaker.success()
    assert breaker.num_failures == 0
    fail(breaker, CORRUPT, CORRUPT, CORRUPT)
    assert breaker.allows()
    fail(breaker, CORRUPT)
    assert not breaker.allows()


def test_one_probe_goes_out_when_the_back_off_is_over() -> None:
    breaker, clock = opened(backoff_s=1.0)
    clock.advance(0.999)
    assert not breaker.allows()
    clock.advance(0.001)
    assert breaker.allows()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows()
    breaker.success()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allows()
    assert breaker.allows()


def test_the_back_off_doubles_to_its_limit_and_starts_over_after_a_success() -> None:
    breaker, clock = opened(backoff_s=1.0, max_backoff_s=5.0)
    for waits in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.advance(waits - 0.01)
        assert not breaker.allows()
        clock.advance(0.01)
        assert breaker.allows()
        fail(breaker, LATE)
        assert breaker.state is BreakerState.OPEN
    clock.advance(5.0)
    assert breaker.allows()
    breaker.success()
    fail(breaker, LATE, LATE, LATE)
    clock.advance(1.0)
    assert breaker.allows()


def test_a_probe_that_finds_nothing_there_found_the_tier_alive() -> None:
    breaker, clock = opened()
    clock.advance(1.0)
    assert breaker.allows()
    fail(breaker, MISSING)
    assert breaker.state is BreakerState.CLOSED


def test_a_corrupt_probe_opens_it_again() -> None:
    breaker, clock = opened()
    clock.advance(1.0)
    assert breaker.allows()
    fail(breaker, CORRUPT)
    assert breaker.state is BreakerState.OPEN


def test_a_lost_probe_is_replaced() -> None:
    breaker, clock = opened(backoff_s=1.0)
    clock.advance(1.0)
    assert breaker.allows()
    clock.advance(0.9)
    assert not breaker.allows()
    clock.advance(0.1)
    assert breaker.allows()


def test_what_was_begun_before_it_opened_changes_nothing() -> None:
    breaker, clock = opened(backoff_s=1.0)
    breaker.success()
    assert not breaker.allows()
    fail(breaker, LATE, LATE, LATE)
    clock.advance(1.0)
    assert breaker.allows()


def test_of_many_threads_one_is_the_probe() -> None:
    breaker, clock = opened()
    clock.advance(1.0)
    start, allowed = threading.Barrier(8), []

    def ask() -> None:
        start.wait(5)
        allowed.append(breaker.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]


def test_each_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    breaker, clock = make(max_failures=2)
    with caplog.at_level(logging.INFO, "kvwise.tiers.breaker"):
        fail(breaker, IO_ERROR, IO_ERROR, IO_ERROR)
        clock.advance(1.0)
        assert breaker.allows()
        breaker.success()
        breaker.success()
    assert [record.getMessage() for record in caplog.records] == [
        "tier redis: breaker open for 1 s after 2 failures in a row, last i/o error: no route",
        "tier redis: breaker half-open, one probe goes out",
        "tier redis: breaker closed, the tier is used again",
    ]


@pytest.mark.parametrize(
    "settings", [{"max_failures": 0}, {"backoff_s": 0.0}, {"backoff_s": 2.0, "max_backoff_s": 1.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="breaker of redis"):
        make(**settings)
