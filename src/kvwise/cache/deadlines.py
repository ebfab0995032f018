"""Deadlines of numbered slots: what is due costs its number, nothing due costs one comparison."""

from heapq import heappop, heappush
from itertools import count

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks

Floats = npt.NDArray[np.float64]


class Deadlines:
    """One deadline a slot, `at` float64 [num_slots] in seconds; infinity is "never".

    Every dated slot is filed once in a heap, under a time no later than its deadline, together with the slots that
    were dated in the same call. A deadline that moves away (a hit prolongs it) is not filed anew until its old time
    comes: so a hit costs one write, and each filing is paid for by the call that dated the slot.
    """

    def __init__(self, num_slots: int) -> None:
        self.at: Floats = np.full(num_slots, np.inf)
        self._filed: Floats = np.full(num_slots, np.inf)
        self._heap: list[tuple[float, int, Blocks]] = []
        self._serial = count()
        self._num_filed = 0
        self._most_filed = 4 * num_slots + 1024

    @property
    def soonest(self) -> float:
        """A lower bound of the next deadline; infinity if there is none."""
        return self._heap[0][0] if self._heap else np.inf

    def set(self, slots: Blocks, at: Floats) -> None:
        """Let the distinct `slots[i]` be due at `at[i]` seconds."""
        self.at[slots] = at
        early = at < self._filed[slots]
        if early.any():
            self._file(slots[early], at[early])
            if self._num_filed > self._most_filed:
                self._file_all_anew()

    def clear(self, slots: Blocks) -> None:
        """`slots` are never due."""
        if self._heap:
            self.at[slots] = np.inf

    def take_due(self, now: float) -> Blocks:
        """The slots due at `now`, ascending; they are not dated any longer."""
        popped: list[tuple[float, int, Blocks]] = []
        while self._heap and self._heap[0][0] <= now:
            popped.append(heappop(self._heap))
        if not popped:
            return np.zeros(0, np.int64)
        slots = np.concatenate([entry[2] for entry in popped])
        times = np.repeat([entry[0] for entry in popped], [len(entry[2]) for entry in popped])
        self._num_filed -= len(slots)
        slots = np.unique(slots[self._filed[slots] == times])
        self._filed[slots] = np.inf
        at = self.at[slots]
        late: Blocks = slots[at <= now]
        self.at[late] = np.inf
        waiting = (now < at) & (at < np.inf)
        self._file(slots[waiting], at[waiting])
        return late

    def num_overlooked(self) -> int:
        """Dated slots that `take_due` would not find in time: for proofs, always 0."""
        filed = np.full(len(self.at), np.inf)
        for time, _, slots in self._heap:
            mine = slots[self._filed[slots] == time]
            filed[mine] = np.minimum(filed[mine], time)
        return int(np.count_nonzero(np.isfinite(self.at) & ~(filed <= self.at)))

    def _file(self, slots: Blocks, at: Floats) -> None:
        if not len(slots):
            return
        self._filed[slots] = at
        self._num_filed += len(slots)
        order = np.argsort(at, kind="stable")
        times, starts = np.unique(at[order], return_index=True)
        for time, part in zip(times.tolist(), np.split(slots[order], starts[1:]), strict=True):
            heappush(self._heap, (time, next(self._serial), part))

    def _file_all_anew(self) -> None:
        """Drop the filings that a shorter deadline overtook."""
        self._heap.clear()
        self._num_filed = 0
        self._filed[:] = np.inf
        dated = np.flatnonzero(self.at < np.inf)
        self._file(dated, self.at[dated])


class Expiry(Deadlines):
    """Deadlines that follow from terms: an end that nothing moves, and an idle time that every hit starts anew."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._ends: Floats = np.full(num_slots, np.inf)
        self._idle_s: Floats = np.full(num_slots, np.inf)
        self._ever_dated = False

    def date(self, slots: Blocks, ends: Floats, idle_s: Floats, now: float) -> None:
        """Stored at `now`, the undated `slots[i]` expires at `ends[i]`, and after `idle_s[i]` seconds without a hit."""
        at = np.minimum(ends, now + idle_s)
        if at.min() < np.inf:
            self._ever_dated = True
            self._ends[slots] = ends
            self._idle_s[slots] = idle_s
            self.set(slots, at)

    def ends_of(self, slots: Blocks) -> Floats:
        """The moments beyond which no hit prolongs `slots`, in seconds; infinity: never."""
        return self._ends[slots]

    def hit(self, slots: Blocks, now: float) -> None:
        """The idle time of `slots` starts anew; what is due already stays so."""
        if self.soonest < np.inf:
            slots = slots[(self.at[slots] > now) & (self._idle_s[slots] < np.inf)]
            if len(slots):
                self.set(slots, np.minimum(self._ends[slots], now + self._idle_s[slots]))

    def clear(self, slots: Blocks) -> None:
        """`slots` never expire: they are empty, until they are dated again."""
        if self._ever_dated:
            super().clear(slots)
            self._ends[slots] = np.inf
            self._idle_s[slots] = np.inf
