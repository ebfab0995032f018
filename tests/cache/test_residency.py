"""Promises of a tier's book, one by one; `tests/machine/test_tier_index_machine.py` mixes them."""

from hashlib import sha256

import numpy as np
import pytest

from kvwise.cache.misses import RemovalReason
from kvwise.cache.residency import Entry, TierIndex
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.core.errors import InvariantError, UsageError

KEYS = [sha256(bytes([i])).digest() for i in range(20)]
A, B, C, D, E = KEYS[:5]


class Index(TierIndex):
    """A tier of 40 bytes, blocks of 10 unless told otherwise."""

    def store(self, *keys, size=10, terms=NO_LIMIT):
        """Reserve and commit; the keys of the victims."""
        reserved = self.reserve([Entry(key, size, i, terms) for i, key in enumerate(keys)])
        assert all(reserved.granted)
        self.commit(keys)
        self.check()
        return [entry.key for entry in reserved.victims]

    def keys(self):
        return {entry.key for entry in self.entries()}


@pytest.fixture
def make_index(clock):
    def make(policy_name="lru", capacity_bytes=40, max_blocks=20, **options):
        return Index(
            "host",
            policy_name=policy_name,
            clock=clock,
            capacity_bytes=capacity_bytes,
            max_blocks=max_blocks,
            **options,
        )

    return make


@pytest.fixture
def index(make_index):
    return make_index()


def test_a_block_is_found_only_after_its_commit(index):
    index.reserve([Entry(A, 10)])
    assert index.find([A]) == 0
    assert index.miss(A).reason == "being computed"
    assert (len(index), index.num_bytes) == (1, 10)
    assert index.commit([A]) == []
    assert index.find([A, B]) == 1
    assert index.num_bytes_of([A, B]) == [10, 0]


def test_a_failed_write_is_forgotten(index):
    index.reserve([Entry(A, 10)])
    index.cancel([A])
    assert (len(index), index.num_bytes) == (0, 0)
    assert index.miss(A).reason == "never stored"
    index.check()


def test_a_key_is_granted_to_one_writer(index):
    assert index.reserve([Entry(A, 10)]).granted == [True]
    assert index.reserve([Entry(A, 10), Entry(B, 10)]).granted == [False, True]
    index.commit([A, B])
    assert index.reserve([Entry(A, 10)]).granted == [False]


def test_a_key_named_twice_is_refused(index):
    with pytest.raises(UsageError, match="named twice"):
        index.reserve([Entry(A, 10), Entry(A, 10)])


def test_the_least_recently_used_leaves_and_says_why(index, clock):
    index.store(A, B, C, D)
    index.touch([A])
    clock.advance(2.0)
    assert index.store(E) == [B]
    assert str(index.miss(B, 7)) == "block 7: evicted by lru at 2.000 s"
    assert index.num_evicted == 1


def test_no_more_leave_than_must(index):
    index.store(A, size=4)
    index.store(B, size=30)
    assert index.store(C, size=7) == [A]
    assert index.store(D, size=30) == [B]
    assert index.num_bytes == 37


def test_what_is_larger_than_the_tier_is_not_granted(index):
    index.store(A)
    reserved = index.reserve([Entry(B, 41), Entry(C, 30)])
    assert (reserved.granted, reserved.victims) == ([False, True], [])


def test_of_a_run_larger_than_the_tier_the_start_is_granted(index):
    index.store(A, B)
    reserved = index.reserve([Entry(key, 10) for key in KEYS[2:10]])
    assert reserved.granted == [True] * 4 + [False] * 4
    assert [entry.key for entry in reserved.victims] == [A, B]


def test_the_number_of_blocks_is_a_limit_too(make_index):
    index = make_index(capacity_bytes=None, max_blocks=2)
    assert index.store(A, B) == []
    assert index.store(C, size=10**12) == [A]


def test_held_blocks_are_no_victims_and_holds_are_counted(index):
    index.store(A, B, C, D)
    index.hold([A, B])
    index.hold([A])
    index.let_go([A, B])
    assert index.store(E) == [C]
    assert index.reserve([Entry(KEYS[6], 40)]).granted == [False]
    index.let_go([A, A, KEYS[9]])
    index.check()
    assert index.store(KEYS[6], size=40) == [D, B, E, A], "let go last is used last"


def test_a_block_both_held_and_pinned_leaves_only_after_both_end(index):
    index.store(A, B, C, D)
    for end_first, end_last in ((index.let_go, index.unpin), (index.unpin, index.let_go)):
        index.hold([A])
        index.pin([A])
        end_first([A])
        index.check()
        assert index.reserve([Entry(E, 40)]).granted == [False]
        end_last([A])
        index.check()
    assert index.store(E, size=40) == [B, C, D, A]


def test_a_block_that_comes_while_it_is_wanted_is_held(index):
    index.hold([A])
    index.store(A, B, C, D)
    assert index.store(E) == [B]
    index.let_go([A])
    index.check()


def test_a_hold_survives_a_purge_and_the_block_that_comes_after(index):
    index.store(A)
    index.hold([A])
    index.remove([A], RemovalReason.PURGED)
    assert index.find([A]) == 0
    index.store(A, B, C, D)
    assert index.store(E) == [B], "the first holder has not let go"
    index.let_go([A])
    index.check()


def test_expired_blocks_are_not_found_and_no_victims(index, clock):
    index.store(A, terms=Terms(expires_at=5.0))
    index.store(B, C, D)
    clock.advance(np.nextafter(5.0, 0))
    assert index.find([A]) == 1
    clock.advance(5.0 - clock.now())
    assert index.find([A]) == 0
    assert index.get(A) is None
    assert index.num_bytes_of([A]) == [0]
    assert index.pin([A]) == 0
    assert index.miss(A).reason == "expired"
    reserved = index.reserve([Entry(E, 10)])
    assert ([entry.key for entry in reserved.expired], reserved.victims) == ([A], [])
    assert (index.num_expired, index.num_evicted) == (1, 0)
    assert index.miss(A).at == 5.0


def test_idle_time_slides_with_each_hit_but_not_beyond_the_end(index, clock):
    index.store(A, terms=Terms(expires_at=12.0, idle_s=5.0))
    for seconds in (4.0, 4.0):
        clock.advance(seconds)
        index.touch([A])
    assert index.deadlines_of([A, B]) == [12.0, np.inf]
    clock.advance(4.0)
    assert index.find([A]) == 0
    assert [entry.key for entry in index.expire()] == [A]


def test_a_hit_does_not_revive_what_is_due(index, clock):
    index.store(A, terms=Terms(idle_s=5.0))
    clock.advance(5.0)
    index.touch([A])
    assert index.find([A]) == 0
    assert len(index.expire()) == 1


def test_a_pin_keeps_from_eviction_until_its_deadline_and_not_from_expiry(index, clock):
    index.store(A, terms=Terms(expires_at=9.0))
    index.store(B, C, D)
    assert index.pin([A, B, E], until=4.0) == 2
    assert index.pin([B], until=2.0) == 1
    assert index.store(E) == [C]
    clock.advance(2.0)
    index.expire()
    assert index.num_pinned == 2
    clock.advance(2.0)
    assert index.expire() == []
    assert index.num_pinned == 0
    index.pin([A, B])
    assert index.unpin([B, C]) == 1
    clock.advance(5.0)
    assert [entry.key for entry in index.expire()] == [A]
    index.check()


def test_what_is_removed_while_it_is_written_is_named_by_the_commit(index):
    index.reserve([Entry(A, 10), Entry(B, 10)])
    assert [entry.key for entry in index.remove([A], RemovalReason.PURGED)] == [A]
    assert index.reserve([Entry(A, 10)]).granted == [False], "its first write is still under way"
    assert [entry.key for entry in index.commit([A, B])] == [A]
    assert index.find([B, A]) == 1
    assert index.miss(A).reason == "purged"
    assert index.num_bytes == 10
    index.check()


@pytest.mark.parametrize("reason", list(RemovalReason))
def test_every_reason_of_leaving_is_a_reason_of_missing(index, reason):
    index.store(A)
    index.remove([A, B], reason)
    assert index.miss(A).reason == reason.value


def test_a_tenant_over_its_quota_pushes_out_its_own_oldest_only(make_index):
    index = make_index(quotas={"t": 25})
    index.store(A, B)
    index.store(C, D, terms=Terms(tenant="t"))
    index.touch([C])
    assert index.store(E, terms=Terms(tenant="t")) == [D]
    assert index.tenant_bytes("t") == 20
    assert index.keys() == {A, B, C, E}


def test_a_tenant_that_holds_its_whole_quota_gets_nothing_more(make_index):
    index = make_index(quotas={"t": 20})
    index.store(A, B, terms=Terms(tenant="t"))
    index.hold([A])
    index.pin([B])
    assert index.reserve([Entry(C, 10, 0, Terms(tenant="t")), Entry(D, 10)]).granted == [False, True]
    index.unpin([B])
    assert index.store(C, terms=Terms(tenant="t")) == [B]


def test_tenants_that_keep_nothing_cost_nothing(index):
    index.store(A, terms=Terms(tenant="t"))
    index.remove([A], RemovalReason.CLEARED)
    assert not index._slots.quotas.used


def test_nothing_due_is_one_comparison(index, clock, monkeypatch):
    index.store(A, terms=Terms(expires_at=50.0))
    for name in ("take_due", "set"):
        monkeypatch.setattr(index._expiry, name, None)
        monkeypatch.setattr(index._slots.pins, name, None)
    clock.advance(49.0)
    assert index.expire() == []


def test_entries_are_those_that_were_stored(index):
    entry = Entry(A, 10, 3, Terms(99.0, 5.0, "t", "s"))
    index.reserve([entry, Entry(B, 7)])
    index.commit([A])
    assert index.get(A) == entry
    assert set(index.entries()) == {entry, Entry(B, 7)}


@pytest.mark.parametrize("options", [{"capacity_bytes": 0}, {"max_blocks": 0}, {"quotas": {"t": -1}}])
def test_sizes_that_make_no_sense_are_refused(make_index, options):
    with pytest.raises(UsageError, match=r"must be >= [01]"):
        make_index(**options)


def lose_a_byte(index):
    index._slots.num_bytes -= 1


def lose_a_slot(index):
    index._slots.free.pop()


def policy_forgot(index):
    index.policy.victims(1)


def hold_nobody_has(index):
    index._slots.held[index._slot_of[A]] = True


def deadline_overlooked(index):
    index._expiry.at[index._slot_of[A]] = 1.0


def tenant_miscounted(index):
    index._slots.quotas.used[""] += 1


def two_keys_one_slot(index):
    index._slot_of[E] = index._slot_of[A]


def pinned_but_offered(index):
    index._slots.pinned[index._slot_of[A]] = True
    index._slots.num_pinned = 1


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_byte,
        lose_a_slot,
        policy_forgot,
        hold_nobody_has,
        deadline_overlooked,
        tenant_miscounted,
        two_keys_one_slot,
        pinned_but_offered,
    ],
)
def test_check_names_the_damage(index, damage):
    index.store(A, B)
    damage(index)
    with pytest.raises(InvariantError):
        index.check()
