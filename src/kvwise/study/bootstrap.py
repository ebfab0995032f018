"""Bootstrap intervals over repeats and requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
MIN_RESAMPLES, MAX_DRAWN = 200, 500_000  # fewer resamples where each is large: there the interval is steady anyway
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its bootstrap interval (95 %)."""

    value: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def percentiles(groups: Sequence[np.ndarray], qs: Sequence[float], seed: int) -> dict[float, Interval]:
    """Percentiles (0..100) of all values with their intervals; `groups` are the repeats. Empty: no values.

    Repeats are drawn with replacement, then values within each.
    """
    drawn = _draw(groups, seed)
    if drawn is None:
        return {}
    values = np.concatenate([group for group in groups if len(group)])
    ordered = np.sort(drawn.values, axis=1)  # the NaN of short repeats go to the end
    return {q: _interval(float(np.percentile(values, q)), _at(ordered, drawn.counts, q)) for q in qs}


def mean(groups: Sequence[np.ndarray], seed: int) -> Interval:
    """The mean of all values with its interval; ValueError if there are none."""
    drawn = _draw(groups, seed)
    if drawn is None:
        raise ValueError("the mean of no values")
    values = np.concatenate([group for group in groups if len(group)])
    return _interval(float(values.mean()), np.nanmean(drawn.values, axis=1))


def rate(groups: Sequence[np.ndarray], seconds: Sequence[float], seed: int) -> Interval:
    """Sum of values over seconds: `groups[r]` are the requests' shares in repeat r, which lasted `seconds[r]` > 0."""
    value = float(sum(group.sum() for group in groups) / sum(seconds))
    rng = np.random.default_rng(seed)
    sums = np.stack([_resampled_sums(group, rng) for group in groups])  # [R, RESAMPLES]
    picked = rng.integers(0, len(groups), size=(RESAMPLES, len(groups)))
    total = sums[picked, np.arange(RESAMPLES)[:, None]].sum(axis=1)
    return _interval(value, total / np.asarray(seconds)[picked].sum(axis=1))


def _resampled_sums(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(group) == 0:
        return np.zeros(RESAMPLES)
    return np.asarray(group[rng.integers(0, len(group), size=(RESAMPLES, len(group)))].sum(axis=1))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Resampled values, one row a resample, NaN where a short repeat was drawn; and how many a row has."""

    values: np.ndarray
    counts: np.ndarray


def _draw(groups: Sequence[np.ndarray], seed: int) -> _Drawn | None:
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return None
    rng = np.random.default_rng(seed)
    sizes = np.array([len(group) for group in filled])
    table = np.full((len(filled), sizes.max()), np.nan)
    for row, group in zip(table, filled, strict=True):
        row[: len(group)] = group
    resamples = int(np.clip(MAX_DRAWN // table.size, MIN_RESAMPLES, RESAMPLES))
    picked = rng.integers(0, len(filled), size=(resamples, len(filled)))
    places = (rng.random((*picked.shape, table.shape[1])) * sizes[picked][..., None]).astype(np.int64)
    values = table[picked[..., None], places]
    values[np.arange(table.shape[1]) >= sizes[picked][..., None]] = np.nan
    return _Drawn(values.reshape(resamples, -1), sizes[picked].sum(axis=1))


def _at(ordered: np.ndarray, counts: np.ndarray, q: float) -> np.ndarray:
    """The `q`-th percentile of the first counts[i] values of each ordered row, interpolated as numpy does."""
    place = q / 100 * (counts - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, counts - 1)
    rows = np.arange(len(ordered))
    low, high = ordered[rows, below], ordered[rows, above]
    return np.asarray(low + (high - low) * (place - below))


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(min(low, value)), float(max(high, value)))
