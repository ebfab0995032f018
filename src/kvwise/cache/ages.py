"""How old published blocks get, how long they lie idle before they are evicted, and how soon they are hit again."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvwise.policies.base import Blocks

# Upper bounds in seconds, as vLLM's histograms of block residency have them.
AGE_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    1200.0, 1800.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AgeHistogram:
    """Observations since the start: `counts[i]` are at most `AGE_BOUNDS_S[i]` and above the bound before it.

    The last of `counts` are above all bounds.
    """

    counts: tuple[int, ...] = (0,) * (len(AGE_BOUNDS_S) + 1)
    total_s: float = 0.0


class AgeFigures(NamedTuple):
    """`lifetime`: from publication until a block left the index, for whatever reason; `idle_before_evict`: from its
    last use until it was evicted; `reuse_gap`: from its last use until a request hit it. A use is publication, a hit,
    and the moment a sequence lets go of it.
    """

    lifetime: AgeHistogram = AgeHistogram()
    idle_before_evict: AgeHistogram = AgeHistogram()
    reuse_gap: AgeHistogram = AgeHistogram()


class _Tally:
    """A histogram that grows: one search and one count for any number of observations."""

    def __init__(self) -> None:
        self._bounds = np.array(AGE_BOUNDS_S)
        self._counts = np.zeros(len(AGE_BOUNDS_S) + 1, np.int64)
        self._total = 0.0

    def add(self, seconds: npt.NDArray[np.float64]) -> None:
        places = self._bounds.searchsorted(seconds)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._total += float(seconds.sum())

    def read(self) -> AgeHistogram:
        return AgeHistogram(tuple(self._counts.tolist()), self._total)


class BlockAges:
    """When each block of a pool was published and last used, in seconds on the clock; nothing is sampled or lost.

    A decode step that publishes no block costs nothing here.
    """

    def __init__(self, num_blocks: int) -> None:
        self._published = np.zeros(num_blocks)
        self._used = np.zeros(num_blocks)
        self._lifetime, self._idle, self._gap = _Tally(), _Tally(), _Tally()

    def publish(self, blocks: Blocks, now: float) -> None:
        """`blocks` are matchable from `now` on."""
        self._published[blocks] = now
        self._used[blocks] = now

    def hit(self, blocks: Blocks, now: float) -> None:
        """A request hit the published `blocks`."""
        if len(blocks):
            self._gap.add(now - self._used[blocks])
            self._used[blocks] = now

    def let_go(self, blocks: Blocks, now: float) -> None:
        """A sequence has no more use for `blocks`."""
        self._used[blocks] = now

    def leave(self, blocks: Blocks, now: float, *, evicted: bool) -> None:
        """Published `blocks` cannot be found any more."""
        self._lifetime.add(now - self._published[blocks])
        if evicted:
            self._idle.add(now - self._used[blocks])

    def figures(self) -> AgeFigures:
        """What was observed so far."""
        return AgeFigures(self._lifetime.read(), self._idle.read(), self._gap.read())
