"""One contract, run over every replacement policy in the folder."""

import numpy as np
import pytest

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


def test_an_unknown_policy_is_named_with_the_choices():
    with pytest.raises(UsageError, match=r"unknown replacement policy 'mru'.*lru"):
        make_policy("mru", 4)
