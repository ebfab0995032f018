"""ARC against the four cases of its paper over ordered dictionaries."""

from collections import OrderedDict

from kvwise.policies.arc import ARC
from tests.policies.driver import Cache, assert_same_victims, hit, ids, insert, random_trace


class NaiveARC:
    """Figure 4 of the paper; REPLACE comes before the target moves, because room is made before content is named."""

    def __init__(self, capacity):
        self.c, self.p = capacity, 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))

    def access(self, x):
        gone = None
        if x in self.t1 or x in self.t2:  # case I
            self.t1.pop(x, None)
            self.t2.pop(x, None)
            self.t2[x] = None
        elif x in self.b1:  # case II
            gone = self.replace()
            self.p = min(self.c, self.p + max(len(self.b2) / len(self.b1), 1))
            del self.b1[x]
            self.t2[x] = None
        elif x in self.b2:  # case III
            gone = self.replace()
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            del self.b2[x]
            self.t2[x] = None
        else:  # case IV
            gone = self.make_room()
            self.t1[x] = None
        assert len(self.t1) + len(self.t2) <= self.c
        return gone

    def make_room(self):
        if len(self.t1) + len(self.b1) == self.c:
            if len(self.t1) == self.c:
                return self.t1.popitem(last=False)[0]
            self.b1.popitem(last=False)
            return self.replace()
        total = len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)
        if total < self.c:
            return None
        if total == 2 * self.c:
            self.b2.popitem(last=False)
        return self.replace()

    def replace(self):
        if (self.t1 and len(self.t1) > self.p) or not self.t2:
            gone = self.t1.popitem(last=False)[0]
            self.b1[gone] = None
        else:
            gone = self.t2.popitem(last=False)[0]
            self.b2[gone] = None
        return gone


def test_it_evicts_what_the_paper_does():
    assert_same_victims(ARC, NaiveARC)


def test_ghosts_stay_within_the_papers_bounds():
    arc = ARC(30)
    cache = Cache(arc, 30)
    for content in random_trace(7):
        cache.access(content)
        once, again = map(len, arc._ghosts)
        assert arc._num_resident[0] + once <= 30
        assert sum(arc._num_resident) + once + again <= 60
        assert 0 <= arc._target <= 30


def test_a_scan_leaves_what_was_used_again():
    arc = ARC(4)
    insert(arc, [0, 1, 2, 3])
    hit(arc, [0])
    assert arc.victims(2).tolist() == [1, 2]
    assert arc.victims(2).tolist() == [3, 0]


def test_a_returning_ghost_moves_room_to_its_side():
    arc = ARC(4)
    insert(arc, [0, 1, 2, 3])
    hit(arc, [0, 1, 2])
    assert arc.victims(1).tolist() == [3]
    insert(arc, [3])  # a ghost of T1: its target is 1 now, and block 3 belongs to T2
    assert arc.victims(1).tolist() == [0]
    arc.insert(ids([0]), ids([99]).astype("uint64"), ids([0]))
    arc.offer(ids([0]))
    assert arc.victims(1).tolist() == [1]  # T1 holds one block, which is not above its target
