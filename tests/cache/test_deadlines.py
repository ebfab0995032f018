"""Promises of deadlines: due means due, and nothing due costs one comparison."""

import numpy as np
import pytest

from kvwise.cache.deadlines import Deadlines, Expiry


def ids(*slots):
    return np.array(slots, np.int64)


@pytest.fixture
def deadlines():
    return Deadlines(16)


def test_a_slot_is_due_at_its_deadline_and_once(deadlines):
    deadlines.set(ids(3, 5), np.array([2.0, 4.0]))
    assert deadlines.take_due(np.nextafter(2.0, 0)).tolist() == []
    assert deadlines.take_due(2.0).tolist() == [3]
    assert deadlines.take_due(2.0).tolist() == []
    assert deadlines.take_due(9.0).tolist() == [5]
    assert deadlines.soonest == np.inf


def test_soonest_is_never_later_than_the_next_deadline(deadlines):
    deadlines.set(ids(1), np.array([5.0]))
    deadlines.set(ids(2), np.array([3.0]))
    assert deadlines.soonest == 3.0
    deadlines.set(ids(2), np.array([9.0]))
    assert deadlines.soonest <= 5.0
    assert deadlines.take_due(4.0).tolist() == []
    assert deadlines.soonest == 5.0, "the old time of a deadline that moved is gone once it came"


def test_a_deadline_may_move_nearer(deadlines):
    deadlines.set(ids(1), np.array([9.0]))
    deadlines.set(ids(1), np.array([2.0]))
    assert deadlines.take_due(2.0).tolist() == [1]
    assert deadlines.take_due(20.0).tolist() == []


def test_a_cleared_slot_is_never_due(deadlines):
    deadlines.set(ids(1, 2), np.array([2.0, 2.0]))
    deadlines.clear(ids(1))
    assert deadlines.take_due(3.0).tolist() == [2]


def test_moving_a_deadline_away_files_nothing(deadlines):
    deadlines.set(ids(*range(16)), np.full(16, 10.0))
    for at in range(11, 500):
        deadlines.set(ids(*range(16)), np.full(16, float(at)))
    assert len(deadlines._heap) == 1


def test_filings_stay_bounded_when_deadlines_keep_moving_nearer(deadlines):
    most = 0
    for at in range(9000, 0, -1):
        deadlines.set(ids(at % 16), np.array([float(at)]))
        most = max(most, deadlines._num_filed)
    assert most <= 4 * 16 + 1024 + 1
    assert deadlines.num_overlooked() == 0


def test_random_operations_against_a_dict(deadlines):
    rng = np.random.default_rng(3)
    at: dict[int, float] = {}
    now = 0.0
    for _ in range(4000):
        chosen = rng.permutation(16)[: rng.integers(1, 6)].astype(np.int64)
        action = rng.integers(4)
        if action < 2:
            times = now + rng.integers(-1, 8, len(chosen)).astype(float)
            times[rng.random(len(chosen)) < 0.1] = np.inf
            deadlines.set(chosen, times)
            at.update(zip(chosen.tolist(), times.tolist(), strict=True))
        elif action == 2:
            deadlines.clear(chosen)
            for slot in chosen.tolist():
                at.pop(slot, None)
        else:
            now += float(rng.integers(0, 3))
            due = sorted(slot for slot, time in at.items() if time <= now)
            assert deadlines.take_due(now).tolist() == due
            for slot in due:
                del at[slot]
        at = {slot: time for slot, time in at.items() if time < np.inf}
        assert deadlines.num_overlooked() == 0
        assert deadlines.soonest <= min(at.values(), default=np.inf)


def test_a_hit_starts_the_idle_time_anew_up_to_the_end():
    expiry = Expiry(4)
    expiry.date(ids(0, 1), np.array([12.0, np.inf]), np.array([5.0, 5.0]), 0.0)
    expiry.hit(ids(0, 1), 4.0)
    expiry.hit(ids(0), 8.0)
    assert expiry.at[:2].tolist() == [12.0, 9.0]


def test_a_hit_does_not_revive_what_is_due():
    expiry = Expiry(4)
    expiry.date(ids(0), np.array([np.inf]), np.array([5.0]), 0.0)
    expiry.hit(ids(0), 5.0)
    assert expiry.take_due(5.0).tolist() == [0]


def test_what_stood_in_a_slot_before_dates_nothing_after():
    expiry = Expiry(4)
    expiry.date(ids(0), np.array([np.inf]), np.array([5.0]), 0.0)
    expiry.take_due(5.0)
    expiry.clear(ids(0))
    expiry.date(ids(0), np.array([np.inf]), np.array([np.inf]), 6.0)
    expiry.date(ids(1), np.array([99.0]), np.array([np.inf]), 6.0)
    expiry.hit(ids(0), 7.0)
    assert expiry.take_due(50.0).tolist() == []
