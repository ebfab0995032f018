"""A shelf: which rows of one layer of one request lie on the device, and what brings the chosen ones to the front."""

from dataclasses import dataclass

import numpy as np

Int64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Bool = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step does to a shelf: moves from slot to slot, all read before any is written, and rows to fetch.

    int64 arrays: `moved` [3, k] of head, slot from, slot to; `fetched` [3, n] of head, row, slot to. Slots count from
    each head's first. `num_slots` are what a head then needs, `num_found` the chosen rows that were there already.
    """

    moved: Int64
    fetched: Int64
    num_slots: int
    num_found: int


class Shelf:
    """Slots [H, S]: in front those that the step reads, then one for the step's own token, then rows kept for later.

    A row is kept for `keep` steps after the one that read it. A row that stays among those that are read stays in its
    slot; attention does not depend on their order.
    """

    def __init__(self, num_heads: int, keep: int) -> None:
        self._keep = keep
        self._rows: Int64 = np.zeros((num_heads, 0), dtype=np.int64)
        self._age: Int64 = np.zeros((num_heads, 0), dtype=np.int64)  # steps since it was read; `keep`: nothing there
        # The slot a row was last given; to be believed only where that slot says so too.
        self._place: Int64 = np.zeros((num_heads, 0), dtype=np.int64)

    def plan(self, chosen: Int64, own: int | None = None) -> Plan:
        """Have rows `chosen` [H, n], which differ within a head, in slots 0..n-1, and row `own` in slot n.

        The shelf is then as if moves and fetches had been made.
        """
        if not self._keep:
            return self._anew(chosen)
        num_heads, num_read = chosen.shape
        self._make_place(max(int(chosen.max()), own or 0) + 1)
        heads = np.broadcast_to(np.arange(num_heads)[:, None], chosen.shape)
        found, slots = self._find(heads, chosen)
        width = self._widen(heads[found], slots[found], num_read)
        read = np.zeros(self._rows.shape, dtype=np.bool_)
        read[heads[found], slots[found]] = True
        young = ~read & (self._age + 1 < self._keep)
        column = np.arange(width)
        stays = (read & (column < num_read)) | (young & (column > num_read))
        front, back = ~stays & (column < num_read), ~stays & (column > num_read)
        to_front, to_back = read & ~stays, young & ~stays
        moved = np.concatenate([_pair(to_front, front), _pair(to_back, back)], axis=1)
        missing = ~found
        fetched = np.stack([heads[missing], chosen[missing], _nth(front, heads[missing], to_front.sum(1))])
        self._carry_out(stays, np.where(read, 0, self._age + 1), moved, fetched)
        self._put_own(num_read, own)
        return Plan(moved, fetched, self._rows.shape[1], int(found.sum()))

    def _anew(self, chosen: Int64) -> Plan:
        """Nothing is kept, so all is fetched."""
        self._rows = np.pad(chosen, ((0, 0), (0, 1)))
        heads, slots = np.indices(chosen.shape).reshape(2, -1)
        return Plan(np.zeros((3, 0), dtype=np.int64), np.stack([heads, chosen.ravel(), slots]), self._rows.shape[1], 0)

    def _make_place(self, num_rows: int) -> None:
        have = self._place.shape[1]
        if num_rows > have:
            self._place = np.pad(self._place, ((0, 0), (0, max(num_rows - have, have))))

    def _find(self, heads: Int64, chosen: Int64) -> tuple[Bool, Int64]:
        """Which of the chosen rows are there, and in which slot."""
        if not self._rows.shape[1]:
            return np.zeros(chosen.shape, dtype=np.bool_), chosen
        slots = np.minimum(self._place[heads, chosen], self._rows.shape[1] - 1)
        return (self._rows[heads, slots] == chosen) & (self._age[heads, slots] < self._keep), slots

    def _widen(self, heads: Int64, slots: Int64, num_read: int) -> int:
        """Have slots for `num_read` rows, the step's own, and all that are kept besides; how many these are."""
        have = self._rows.shape[1]
        kept = self._age + 1 < self._keep
        kept[heads, slots] = False
        width = max(have, num_read + 1 + int(kept.sum(1).max(initial=0)))
        more = ((0, 0), (0, width - have))
        self._rows = np.pad(self._rows, more)
        self._age = np.pad(self._age, more, constant_values=self._keep)
        return width

    def _carry_out(self, stays: Bool, age: Int64, moved: Int64, fetched: Int64) -> None:
        """What lies where afterwards, and how old it is."""
        rows = self._rows.copy()
        self._age = np.where(stays, age, self._keep)
        for heads, slots, what, old in (
            (moved[0], moved[2], rows[moved[0], moved[1]], age[moved[0], moved[1]]),
            (fetched[0], fetched[2], fetched[1], 0),
        ):
            self._rows[heads, slots], self._age[heads, slots], self._place[heads, what] = what, old, slots

    def _put_own(self, num_read: int, own: int | None) -> None:
        """The step's own row behind those it reads; slots at the end that hold nothing are let go."""
        if own is not None:
            self._rows[:, num_read], self._age[:, num_read], self._place[:, own] = own, 0, num_read
        used = np.flatnonzero((self._age < self._keep).any(0))
        width = max(num_read + 1, int(used[-1]) + 1 if used.size else 0)
        self._rows, self._age = self._rows[:, :width], self._age[:, :width]


def _pair(movers: Bool, free: Bool) -> Int64:
    """Each head's i-th mover and its i-th free slot: [3, k] of head, from, to."""
    heads, slots = movers.nonzero()
    return np.stack([heads, slots, _nth(free, heads, np.zeros(len(free), dtype=np.int64))])


def _nth(free: Bool, heads: Int64, taken: Int64) -> Int64:
    """For heads [k] in ascending order, the free slots of each in turn, after the first `taken` [H] of them."""
    if not len(heads):
        return np.zeros(0, dtype=np.int64)
    slots = free.nonzero()[1]
    num_free, num_wanted = free.sum(1), np.bincount(heads, minlength=len(free))
    # Where each head's free slots begin in `slots`, less where its wishes begin in `heads`.
    offset = (num_free.cumsum() - num_free) + taken - (num_wanted.cumsum() - num_wanted)
    found: Int64 = slots[offset[heads] + np.arange(len(heads))]
    return found
