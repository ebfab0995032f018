"""FIFO against a list."""

from kvwise.policies.fifo import FIFO
from tests.policies.driver import assert_same_victims, hit, ids, insert


class NaiveFIFO:
    def __init__(self, capacity):
        self.capacity, self.contents = capacity, []

    def access(self, content):
        if content in self.contents:
            return None
        gone = self.contents.pop(0) if len(self.contents) == self.capacity else None
        self.contents.append(content)
        return gone


def test_it_evicts_what_a_list_does():
    assert_same_victims(FIFO, NaiveFIFO)


def test_hits_and_holds_change_no_order():
    fifo = FIFO(4)
    insert(fifo, [2, 0])
    insert(fifo, [3, 1])
    hit(fifo, [0, 2])
    assert fifo.victims(4).tolist() == [2, 0, 3, 1]


def test_a_block_held_when_its_turn_comes_goes_to_the_back():
    fifo = FIFO(4)
    insert(fifo, [0, 1, 2, 3])
    fifo.hold(ids([0]))
    assert fifo.victims(1).tolist() == [1]
    fifo.offer(ids([0]))
    assert fifo.victims(3).tolist() == [2, 3, 0]
