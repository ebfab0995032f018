"""The Pareto set: strategies that no other beats in score without holding more bytes, and what the errors allow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvwise.study.estimate import Estimate, Z
from kvwise.study.scores import QualityFigures

ALIKE = 1.01  # bytes that differ by less are equal: medians over steps differ by as much


class Bytes(StrEnum):
    """Which bytes are counted against the score."""

    DEVICE = "on the device"
    ALL = "in all tiers"


class Standing(StrEnum):
    """Where a point stands to the front."""

    ON = "yes"  # by its value: no other is as good in both and better in one
    WITHIN = "within the error"  # not by its value, but nobody who holds no more bytes is better beyond the error
    OFF = "no"


@dataclass(frozen=True, slots=True)
class Point:
    """A strategy with its bytes per token and its score. Bytes that differ by less than 1 % count as equal.

    `beaten_by` is, of those that are better beyond the error with no more bytes, the one with the best score; None
    unless `standing` is OFF.
    """

    quality: QualityFigures
    num_bytes: float
    score: Estimate
    standing: Standing
    beaten_by: QualityFigures | None = None


def pareto(here: Sequence[QualityFigures], count: Bytes) -> list[Point]:
    """Every strategy of one model and context length that has a score and holds KV, from many bytes to few."""
    placed = [(q, held(q, count), q.score) for q in here]
    known = [(q, size, score) for q, size, score in placed if score is not None and size > 0]
    points = [_point(q, size, score, known) for q, size, score in known]
    return sorted(points, key=lambda p: (-p.num_bytes, -p.score.value, p.quality.who.order))


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those on the front by their value, from many bytes to few."""
    return [p for p in points if p.standing is Standing.ON]


def held(quality: QualityFigures, count: Bytes) -> float:
    """KV bytes per token."""
    per_tier = quality.kv_bytes_per_token
    return per_tier.get("device", 0.0) if count is Bytes.DEVICE else sum(per_tier.values())


def front(points: Sequence[tuple[float, ...]]) -> tuple[bool, ...]:
    """Which points are dominated by no other: none is as good in everything and better in something. More is better."""
    return tuple(not any(_dominates(other, point) for other in points) for point in points)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def _point(
    q: QualityFigures, size: float, score: Estimate, known: Sequence[tuple[QualityFigures, float, Estimate]]
) -> Point:
    rivals = [(p, other_size, other) for p, other_size, other in known if other_size <= size * ALIKE]
    ahead = (other.value > score.value or (other.value == score.value and other_size * ALIKE < size)
             for _, other_size, other in rivals)  # fmt: skip
    if not any(ahead):
        return Point(q, size, score, Standing.ON)
    better = [(other.value, -other_size, p.who.order, p) for p, other_size, other in rivals
              if _clearly_above(other, score)]  # fmt: skip
    if not better:
        return Point(q, size, score, Standing.WITHIN)
    return Point(q, size, score, Standing.OFF, max(better, key=lambda found: found[:3])[3])


def _clearly_above(a: Estimate, b: Estimate) -> bool:
    return a.value - b.value > Z * math.hypot(a.error, b.error)
