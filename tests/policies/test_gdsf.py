"""GDSF against a dictionary of priorities."""

import numpy as np

from kvwise.policies.gdsf import GDSF
from tests.policies.driver import assert_same_victims, depth_of, hit, ids, insert


class NaiveGDSF:
    def __init__(self, capacity):
        self.capacity, self.clock, self.now = capacity, 0, 0
        self.frequency, self.rank = {}, {}

    def access(self, content):
        self.now += 1
        gone = None
        if content not in self.rank and len(self.rank) == self.capacity:
            gone = min(self.rank, key=self.rank.__getitem__)
            self.clock = self.rank.pop(gone)[0]
            del self.frequency[gone]
        self.frequency[content] = self.frequency.get(content, 0) + 1
        cost = 1 + depth_of(content) // 2048
        self.rank[content] = (self.clock + self.frequency[content] * cost, self.now)
        return gone


def test_it_evicts_what_the_formula_does():
    assert_same_victims(GDSF, NaiveGDSF)


def test_deep_blocks_cost_more_and_neighbours_cost_the_same():
    gdsf = GDSF(4)
    gdsf.insert(ids([0, 1, 2, 3]), ids([0, 1, 2, 3]).astype(np.uint64), ids([2048, 2047, 5000, 0]))
    gdsf.offer(ids([0, 1, 2, 3]))
    assert gdsf.victims(4).tolist() == [1, 3, 0, 2]


def test_the_clock_lets_old_hits_fade():
    gdsf = GDSF(2)
    insert(gdsf, [0])
    for _ in range(3):
        hit(gdsf, [0])
    fading = []
    for _ in range(5):
        insert(gdsf, [1])
        fading += gdsf.victims(1).tolist()
        if fading[-1] == 0:
            break
    assert fading == [1, 1, 1, 0]


def test_entries_that_are_no_longer_true_are_swept():
    gdsf = GDSF(8)
    insert(gdsf, range(8))
    for _ in range(200):
        hit(gdsf, range(8))
    assert len(gdsf._heap) <= 2 * 8 + 64 + 8
    assert sorted(gdsf.victims(8).tolist()) == list(range(8))
