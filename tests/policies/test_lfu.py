"""LFU against a dictionary of counts."""

from kvwise.policies.lfu import LFU
from tests.policies.driver import assert_same_victims, hit, ids, insert


class NaiveLFU:
    def __init__(self, capacity):
        self.capacity, self.used, self.now = capacity, {}, 0

    def access(self, content):
        self.now += 1
        count, gone = self.used.get(content, (0, 0))[0], None
        if not count and len(self.used) == self.capacity:
            gone = min(self.used, key=self.used.__getitem__)
            del self.used[gone]
        self.used[content] = (count + 1, self.now)
        return gone


def test_it_evicts_what_counting_does():
    assert_same_victims(LFU, NaiveLFU)


def test_among_equals_the_least_recent_leaves_first():
    lfu = LFU(4)
    insert(lfu, [0, 1, 2, 3])
    hit(lfu, [2])
    hit(lfu, [0])
    assert lfu.victims(4).tolist() == [1, 3, 2, 0]


def test_a_block_that_returns_starts_anew():
    lfu = LFU(2)
    insert(lfu, [0])
    for _ in range(5):
        hit(lfu, [0])
    lfu.remove(ids([0]))
    insert(lfu, [0, 1])
    hit(lfu, [1])
    assert lfu.victims(1).tolist() == [0]


def test_touches_while_held_count_each():
    lfu = LFU(2)
    insert(lfu, [0, 1])
    hit(lfu, [1])
    lfu.hold(ids([0]))
    for _ in range(3):
        lfu.touch(ids([0]))
    lfu.offer(ids([0]))
    assert lfu.victims(2).tolist() == [1, 0]


def test_queues_of_frequencies_no_longer_in_use_are_used_again():
    lfu = LFU(1)
    for _ in range(50):
        insert(lfu, [0])
        hit(lfu, [0])
        assert lfu.victims(1).tolist() == [0]
    insert(lfu, [0])
    assert len(lfu._queues.length) <= 3
