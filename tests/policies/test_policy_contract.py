"""One contract, run over every replacement policy in the folder."""

import sys

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvwise.core.errors import UsageError
from kvwise.policies.catalogue import make_policy, policies

NUM_BLOCKS = 24


def ids(*blocks):
    return np.array(blocks, np.int64)


def insert(policy, blocks, offered=True):
    """Make blocks resident; content of block b has tag b."""
    policy.insert(blocks, blocks.astype(np.uint64), np.zeros(len(blocks), np.int64))
    if offered:
        policy.offer(blocks)


@pytest.fixture(params=sorted(policies()))
def policy(request):
    return make_policy(request.param, NUM_BLOCKS)


def test_its_name_is_its_files_name(policy):
    assert policies()[policy.name] is type(policy)


def test_an_empty_policy_has_no_victims(policy):
    assert len(policy) == 0
    assert policy.victims(3).tolist() == []


def test_every_offered_block_leaves_exactly_once(policy):
    insert(policy, np.arange(NUM_BLOCKS, dtype=np.int64))
    assert len(policy) == NUM_BLOCKS
    left = np.concatenate([policy.victims(5) for _ in range(6)])
    assert sorted(left.tolist()) == list(range(NUM_BLOCKS))
    assert len(policy) == 0


def test_held_blocks_are_never_victims(policy):
    insert(policy, ids(0, 1, 2, 3))
    policy.hold(ids(1, 3))
    policy.touch(ids(1, 3))
    assert len(policy) == 2
    assert sorted(policy.victims(10).tolist()) == [0, 2]


def test_a_new_resident_is_held_until_offered(policy):
    insert(policy, ids(4, 5), offered=False)
    assert policy.victims(10).tolist() == []
    policy.offer(ids(5))
    assert policy.victims(10).tolist() == [5]


def test_removed_blocks_never_come_back(policy):
    insert(policy, ids(0, 1, 2, 3))
    policy.hold(ids(0))
    policy.remove(ids(0, 1))
    assert len(policy) == 2
    assert sorted(policy.victims(10).tolist()) == [2, 3]


def test_a_block_id_can_be_reused_for_new_content(policy):
    for _ in range(5 * NUM_BLOCKS):
        insert(policy, ids(7))
        assert policy.victims(1).tolist() == [7]


def test_victims_take_no_more_than_asked(policy):
    insert(policy, np.arange(10, dtype=np.int64))
    assert len(policy.victims(4)) == 4
    assert len(policy) == 6


def test_random_operations_against_sets(policy):
    rng = np.random.default_rng(5)
    held, offered = set(), set()
    for _ in range(3000):
        absent = sorted(set(range(NUM_BLOCKS)) - held - offered)
        action = rng.integers(6)
        pool = sorted(({0: absent, 1: held, 2: offered, 3: held, 4: held | offered, 5: offered})[int(action)])
        chosen = rng.permutation(pool)[: rng.integers(1, 6)].astype(np.int64)
        if action == 0:
            insert(policy, chosen, offered=False)
            held |= set(chosen.tolist())
        elif action == 1:
            policy.offer(chosen)
            held, offered = held - set(chosen.tolist()), offered | set(chosen.tolist())
        elif action == 2:
            policy.hold(chosen)
            held, offered = held | set(chosen.tolist()), offered - set(chosen.tolist())
        elif action == 3:
            policy.touch(chosen)
        elif action == 4:
            policy.remove(chosen)
            held, offered = held - set(chosen.tolist()), offered - set(chosen.tolist())
        else:
            left = policy.victims(2).tolist()
            assert len(left) == min(2, len(offered))
            assert set(left) <= offered
            offered -= set(left)
        assert len(policy) == len(offered)


class PolicyMachine(RuleBasedStateMachine):
    """Whatever a manager that keeps its promises may do; invariants are the policy's promises."""

    def __init__(self, name):
        super().__init__()
        self.policy = make_policy(name, NUM_BLOCKS)
        self.absent, self.held, self.offered = set(range(NUM_BLOCKS)), set(), set()

    def choose(self, data, pool):
        return data.draw(st.lists(st.sampled_from(sorted(pool)), min_size=1, unique=True))

    @precondition(lambda self: self.absent)
    @rule(data=st.data(), first_tag=st.integers(0, 9))
    def insert(self, data, first_tag):
        blocks = self.choose(data, self.absent)
        tags = np.arange(first_tag, first_tag + len(blocks), dtype=np.uint64)  # few tags: content returns often
        self.policy.insert(ids(*blocks), tags, 1000 * np.arange(len(blocks)))
        self.absent -= set(blocks)
        self.held |= set(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def offer(self, data):
        blocks = self.choose(data, self.held)
        self.policy.offer(ids(*blocks))
        self.held -= set(blocks)
        self.offered |= set(blocks)

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def hold(self, data):
        blocks = self.choose(data, self.offered)
        self.policy.hold(ids(*blocks))
        self.offered -= set(blocks)
        self.held |= set(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), times=st.integers(1, 4))
    def touch(self, data, times):
        blocks = self.choose(data, self.held)
        for _ in range(times):
            self.policy.touch(ids(*blocks))

    @precondition(lambda self: self.held or self.offered)
    @rule(data=st.data())
    def remove(self, data):
        blocks = self.choose(data, self.held | self.offered)
        self.policy.remove(ids(*blocks))
        self.held -= set(blocks)
        self.offered -= set(blocks)
        self.absent |= set(blocks)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def victims(self, count):
        blocks = self.policy.victims(count)
        assert blocks.dtype == np.int64
        gone = set(blocks.tolist())
        assert len(gone) == len(blocks) == min(count, len(self.offered))
        assert gone <= self.offered
        self.offered -= gone
        self.absent |= gone

    @invariant()
    def counts_the_offered(self):
        assert len(self.policy) == len(self.offered)

    def teardown(self):
        assert set(self.policy.victims(2 * NUM_BLOCKS).tolist()) == self.offered


@pytest.mark.parametrize("name", sorted(policies()))
def test_it_keeps_its_promises_to_any_manager_that_keeps_its_own(name):
    run_state_machine_as_test(
        lambda: PolicyMachine(name), settings=settings(max_examples=25, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [name for name, kind in policies().items() if kind.newest_last])
def test_newest_last_means_that_a_run_may_choose_its_victims_at_once(name, seed):
    rng = np.random.default_rng(seed)
    one_by_one, at_once = (make_policy(name, NUM_BLOCKS) for _ in range(2))
    for twin in (one_by_one, at_once):
        insert(twin, np.arange(NUM_BLOCKS, dtype=np.int64))
    for _ in range(20):
        hit = rng.permutation(NUM_BLOCKS)[: rng.integers(1, 6)].astype(np.int64)
        for twin in (one_by_one, at_once):
            twin.hold(hit)
            twin.touch(hit)
            twin.offer(hit)
    count = int(rng.integers(2, NUM_BLOCKS + 1))
    gone = []
    for tag in range(100, 100 + count):
        (block,) = one_by_one.victims(1)
        gone.append(int(block))
        one_by_one.insert(ids(block), np.array([tag], np.uint64), ids(0))
        one_by_one.offer(ids(block))
    assert at_once.victims(count).tolist() == gone


def test_held_blocks_are_not_walked_over_again_and_again(policy):
    """Work is proportional to the blocks named: 1500 held ones in the way do not make 300 turnovers dearer."""
    held = 1500
    policy = make_policy(policy.name, held + 1)
    insert(policy, np.arange(held + 1, dtype=np.int64))
    policy.hold(np.arange(held, dtype=np.int64))
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(300):
            insert(policy, policy.victims(1))
    finally:
        sys.setprofile(None)
    assert calls < 20 * held + 300 * 60


def test_an_unknown_policy_is_named_with_the_choices():
    with pytest.raises(UsageError, match=r"unknown replacement policy 'mru'.*lru"):
        make_policy("mru", 4)
