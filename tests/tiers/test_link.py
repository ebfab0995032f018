"""A link moves in order, in the background, and never faster than it may; time is handed in."""

import threading

import pytest

from kvwise.core.clock import VirtualClock
from kvwise.tiers.link import Link


def throttled(speed: float) -> tuple[Link, VirtualClock]:
    """A link on a clock that only its own waiting moves."""
    clock = VirtualClock(10.0)
    return Link("host:device", speed, clock, clock.advance), clock


def test_a_transfer_takes_its_bytes_over_the_speed() -> None:
    link, clock = throttled(1000.0)
    assert link.begin(lambda: "arrived", 2500).result() == "arrived"
    assert clock.now() == pytest.approx(12.5)
    link.begin(lambda: None, 500).result()
    assert clock.now() == pytest.approx(13.0)
    assert link.num_bytes == 3000
    link.close()


def test_an_idle_link_saves_nothing_up() -> None:
    link, clock = throttled(1000.0)
    link.begin(lambda: None, 1000).result()
    clock.advance(50.0)
    link.begin(lambda: None, 1000).result()
    assert clock.now() == pytest.approx(10 + 1 + 50 + 1)
    link.close()


def test_time_the_transfer_itself_took_counts() -> None:
    link, clock = throttled(1000.0)
    link.begin(lambda: clock.advance(0.4), 1000).result()
    assert clock.now() == pytest.approx(11.0)
    link.begin(lambda: clock.advance(3.0), 1000).result()  # slower than the throttle: nothing to add
    assert clock.now() == pytest.approx(14.0)
    link.close()


def test_without_a_throttle_nobody_waits() -> None:
    clock = VirtualClock()
    link = Link("host:device", None, clock, clock.advance)
    link.begin(lambda: None, 10**12).result()
    assert clock.now() == 0.0
    link.close()


def test_transfers_keep_their_order_and_run_beside_the_caller() -> None:
    link = Link("host:device")
    gate, seen = threading.Event(), []
    first = link.begin(lambda: gate.wait(10) and seen.append("first"), 1)
    second = link.begin(lambda: seen.append("second"), 1)
    assert not first.done()
    gate.set()
    second.result(10)
    assert seen == ["first", "second"]
    link.close()


def test_a_transfer_that_fails_says_so_and_the_link_goes_on() -> None:
    link, _clock = throttled(1000.0)

    def broken() -> None:
        raise OSError("no such page")

    with pytest.raises(OSError, match="no such page"):
        link.begin(broken, 1000).result()
    assert link.begin(lambda: 7, 1000).result() == 7
    link.close()


def test_the_label_tells_of_the_throttle() -> None:
    assert throttled(12e9)[0].label == "host:device throttled to 12 GB/s"
    assert Link("device:host").label == "device:host (not throttled)"
