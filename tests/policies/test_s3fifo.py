"""S3-FIFO against its published pseudo-code over lists."""

import numpy as np

from kvwise.policies.s3fifo import S3FIFO
from tests.policies.driver import assert_same_victims, hit, ids, insert


class NaiveS3FIFO:
    """Algorithm 1 of the paper; the lists run from tail (oldest) to head."""

    def __init__(self, capacity):
        self.capacity, self.hits = capacity, {}
        self.small, self.main, self.ghost = [], [], []

    def access(self, content):
        if content in self.hits:
            self.hits[content] = min(self.hits[content] + 1, 3)
            return None
        gone = None
        while len(self.hits) == self.capacity:
            gone = self.evict_small() if len(self.small) >= 0.1 * self.capacity else self.evict_main()
            self.hits = {c: n for c, n in self.hits.items() if c != gone}
        if content in self.ghost:
            self.ghost.remove(content)
            self.main.append(content)
        else:
            self.small.append(content)
        self.hits[content] = 0
        return gone

    def evict_small(self):
        while self.small:
            content = self.small.pop(0)
            if self.hits[content] > 1:
                self.main.append(content)
                self.hits[content] = 0
            else:
                self.ghost.append(content)
                self.ghost = self.ghost[-(self.capacity - self.capacity // 10) :]
                return content
        return None

    def evict_main(self):
        while self.main:
            content = self.main.pop(0)
            if self.hits[content] == 0:
                return content
            self.hits[content] -= 1
            self.main.append(content)
        return None


def test_it_evicts_what_the_pseudo_code_does():
    assert_same_victims(S3FIFO, NaiveS3FIFO)


def full(blocks):
    s3fifo = S3FIFO(blocks)
    insert(s3fifo, range(blocks))
    return s3fifo


def test_two_hits_lead_to_the_main_queue_and_one_does_not():
    s3fifo = full(20)
    for _ in range(2):
        hit(s3fifo, [0])
    hit(s3fifo, [1])
    assert s3fifo.victims(18).tolist() == list(range(1, 19))  # the last of the small queue, its tenth, stays
    assert s3fifo.victims(2).tolist() == [0, 19]


def test_returning_content_is_out_of_reach_of_a_scan():
    s3fifo = full(20)
    assert s3fifo.victims(1).tolist() == [0]
    insert(s3fifo, [0])  # its ghost is known
    assert s3fifo.victims(17).tolist() == list(range(1, 18))
    assert s3fifo.victims(3).tolist() == [18, 0, 19]


def test_a_held_block_that_is_met_keeps_its_queue():
    s3fifo = full(20)
    s3fifo.hold(ids([0]))
    assert s3fifo.victims(1).tolist() == [1]
    s3fifo.offer(ids([0]))
    assert s3fifo.victims(19).tolist() == [*range(2, 20), 0]


def test_a_held_block_of_the_main_queue_comes_back_to_it():
    s3fifo = full(20)
    for _ in range(2):
        hit(s3fifo, [0])
    s3fifo.victims(18)  # 0 moves to the main queue, 19 stays in the small one
    s3fifo.hold(ids([0]))
    insert(s3fifo, [1])
    s3fifo.remove(ids([19]))
    assert s3fifo.victims(1).tolist() == [1]
    assert s3fifo.victims(1).tolist() == []  # the walk through both queues met 0
    s3fifo.offer(ids([0]))
    s3fifo.insert(ids([2, 3]), ids([102, 103]).astype(np.uint64), ids([0, 0]))  # no ghosts
    s3fifo.offer(ids([2, 3]))
    assert s3fifo.victims(3).tolist() == [2, 0, 3]


def test_blocks_that_were_removed_do_not_count_in_the_size_of_the_tier():
    s3fifo = full(20)
    s3fifo.remove(ids(range(20)))
    insert(s3fifo, range(20))
    assert s3fifo._capacity == 20
