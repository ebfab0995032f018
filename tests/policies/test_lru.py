"""LRU against an ordered dictionary."""

from collections import OrderedDict

import numpy as np

from kvwise.policies.lru import LRU


def test_order_is_that_of_the_last_offer():
    lru = LRU(8)
    for blocks in ([2, 1, 0], [4, 3]):
        lru.offer(np.array(blocks, np.int64))
    lru.hold(np.array([1, 2], np.int64))
    lru.offer(np.array([1, 2], np.int64))
    assert lru.victims(8).tolist() == [0, 4, 3, 1, 2]


def test_random_offers_holds_and_victims_equal_an_ordered_dict():
    rng = np.random.default_rng(3)
    lru, model = LRU(16), OrderedDict()
    for _ in range(4000):
        choice = rng.integers(3)
        if choice == 0:
            absent = rng.permutation([b for b in range(16) if b not in model])[: rng.integers(1, 6)].astype(np.int64)
            lru.offer(absent)
            model.update(dict.fromkeys(absent.tolist()))
        elif choice == 1:
            held = rng.permutation(list(model))[: rng.integers(1, 4)].astype(np.int64)
            lru.hold(held)
            for block in held.tolist():
                del model[block]
        else:
            count = int(rng.integers(1, 4))
            expected = [model.popitem(last=False)[0] for _ in range(min(count, len(model)))]
            assert lru.victims(count).tolist() == expected
