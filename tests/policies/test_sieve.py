"""SIEVE against its published pseudo-code over a list."""

from kvwise.policies.sieve import Sieve
from tests.policies.driver import assert_same_victims, hit, ids, insert


class NaiveSieve:
    """Algorithm 1 of the paper; `queue` from head (newest) to tail, `hand` an element of it or None."""

    def __init__(self, capacity):
        self.capacity, self.queue, self.visited, self.hand = capacity, [], {}, None

    def access(self, content):
        if content in self.visited:
            self.visited[content] = True
            return None
        gone = None
        if len(self.queue) == self.capacity:
            gone = self.queue[-1] if self.hand is None else self.hand
            while self.visited[gone]:
                self.visited[gone] = False
                gone = self.newer(gone) or self.queue[-1]
            self.hand = self.newer(gone)
            self.queue.remove(gone)
            del self.visited[gone]
        self.queue.insert(0, content)
        self.visited[content] = False
        return gone

    def newer(self, content):
        place = self.queue.index(content)
        return self.queue[place - 1] if place else None


def test_it_evicts_what_the_pseudo_code_does():
    assert_same_victims(Sieve, NaiveSieve)


def test_the_hand_stays_where_it_evicted():
    sieve = Sieve(5)
    insert(sieve, [0, 1, 2])
    hit(sieve, [0])
    assert sieve.victims(1).tolist() == [1]  # 0 was spared
    insert(sieve, [3, 4])
    assert sieve.victims(3).tolist() == [2, 3, 4]  # not 0, which the hand has passed
    assert sieve.victims(1).tolist() == [0]


def test_the_hand_survives_the_removal_of_its_block():
    sieve = Sieve(4)
    insert(sieve, [0, 1, 2, 3])
    hit(sieve, [0])
    assert sieve.victims(1).tolist() == [1]
    sieve.remove(ids([2]))
    assert sieve.victims(2).tolist() == [3, 0]


def test_a_held_block_that_the_hand_meets_joins_at_the_new_end():
    sieve = Sieve(4)
    insert(sieve, [0, 1, 2, 3])
    sieve.hold(ids([0]))
    assert sieve.victims(1).tolist() == [1]
    sieve.offer(ids([0]))
    assert sieve.victims(3).tolist() == [2, 3, 0]


def test_new_content_in_the_block_of_removed_content_is_not_visited():
    sieve = Sieve(2)
    insert(sieve, [0])
    hit(sieve, [0])
    sieve.remove(ids([0]))
    insert(sieve, [0, 1])
    assert sieve.victims(1).tolist() == [0]
