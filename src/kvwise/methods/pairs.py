"""What composes with what: the pairs of methods of different axes, judged by their traits alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from kvwise.core.method import Axis, Method
from kvwise.core.strategy import conflict


@dataclass(frozen=True, slots=True)
class Pair:
    """Two methods of different axes, in the order of the axes, with their options as they are by default."""

    first: type[Method]
    second: type[Method]
    reason: str | None  # why they cannot work together; None: they can

    def other(self, kind: type[Method]) -> type[Method]:
        """The one that is not `kind`."""
        return self.second if kind is self.first else self.first

    def told_to(self, kind: type[Method]) -> str:
        """The reason as one of the two is told it: itself by name, and "the other"."""
        mine, others = ("the first", "the second") if kind is self.first else ("the second", "the first")
        return (self.reason or "").replace(mine, kind.name).replace(others, "the other")


def pairs(kinds: Iterable[type[Method]]) -> list[Pair]:
    """All pairs of methods of different axes."""
    order = list(Axis)
    ordered = sorted(kinds, key=lambda kind: order.index(kind.axis))
    return [
        Pair(first, second, conflict(first(), second()))
        for first, second in combinations(ordered, 2)
        if first.axis is not second.axis
    ]


def pairs_of(kind: type[Method], kinds: Iterable[type[Method]]) -> list[Pair]:
    """The pairs that one method is in."""
    return [pair for pair in pairs(kinds) if kind in (pair.first, pair.second)]
