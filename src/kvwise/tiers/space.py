"""Room in one arena, handed out in runs of bytes: one run where there is one, several where there is not."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import pairwise

from kvwise.core.errors import InvariantError
from kvwise.tiers.record import ALIGNMENT, padded

Run = tuple[int, int]  # bytes [start, stop), both multiples of 64


class Space:
    """The free part of bytes [0, num_bytes). Not thread-safe.

    Neighbours that are free are one run, always. A request takes the shortest run that is long enough, or else the
    longest ones together: so it is met whenever so many bytes are free, however they lie, and requests of one size
    never need more than one run.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGNMENT * ALIGNMENT
        self.num_free = self.num_bytes
        self._by_size: list[tuple[int, int]] = []  # (length, start), sorted
        self._by_start: dict[int, int] = {}  # start -> stop
        self._by_stop: dict[int, int] = {}
        if self.num_bytes:
            self._add(0, self.num_bytes)

    def take_run(self, num_bytes: int) -> Run | None:
        """The shortest free run that has `num_bytes`, rounded up to 64, cut to that; None if none is long enough."""
        length = padded(num_bytes)
        index = bisect_left(self._by_size, (length, 0))
        return self._cut(index, length) if index < len(self._by_size) and length else None

    def take(self, num_bytes: int) -> list[Run] | None:
        """Runs of `num_bytes` together, rounded up to 64; None if less than that is free."""
        left = padded(num_bytes)
        if left > self.num_free:
            return None
        runs = []
        while left:
            run = self.take_run(left) or self._cut(len(self._by_size) - 1, left)
            runs.append(run)
            left -= run[1] - run[0]
        return runs

    def give_back(self, runs: Iterable[Run]) -> None:
        """Runs as `take` gave them."""
        joined: list[Run] = []
        for start, stop in sorted(runs):
            self.num_free += stop - start
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        for start, stop in joined:
            if (before := self._by_stop.pop(start, None)) is not None:
                self._remove(before, start)
                start = before
            if (after := self._by_start.get(stop)) is not None:
                del self._by_stop[after]
                self._remove(stop, after)
                stop = after
            self._add(start, stop)

    def check(self, taken: Iterable[Run]) -> None:
        """InvariantError unless these runs and the free ones are all bytes, each once, and free neighbours are one."""
        free = sorted(self._by_start.items())
        if sorted(self._by_stop.items()) != sorted((stop, start) for start, stop in free):
            raise InvariantError("free runs differ by where they start and by where they end")
        if self._by_size != sorted((stop - start, start) for start, stop in free):
            raise InvariantError("free runs differ by size and by place")
        if any(stop == start for (_, stop), (start, _) in pairwise(free)):
            raise InvariantError("two free runs are neighbours")
        position = 0
        for start, stop in sorted([*free, *taken]):
            if start != position:
                raise InvariantError(f"byte {min(start, position)} of {self.num_bytes} is lost, or in two places")
            position = stop
        if position != self.num_bytes or self.num_free != sum(stop - start for start, stop in free):
            raise InvariantError(f"{self.num_free} bytes are said to be free, runs end at {position}")

    def _cut(self, index: int, length: int) -> Run:
        """At most `length` bytes of the free run with this index."""
        start = self._by_size.pop(index)[1]
        stop = self._by_start.pop(start)
        del self._by_stop[stop]
        end = min(stop, start + length)
        if end < stop:
            self._add(end, stop)
        self.num_free -= end - start
        return start, end

    def _add(self, start: int, stop: int) -> None:
        insort(self._by_size, (stop - start, start))
        self._by_start[start] = stop
        self._by_stop[stop] = start

    def _remove(self, start: int, stop: int) -> None:
        del self._by_start[start]
        del self._by_size[bisect_left(self._by_size, (stop - start, start))]
