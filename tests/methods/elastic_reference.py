"""Elastic Cache written down plainly from its description: lists and loops. See plain_run."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tests.methods.plain_run import Head


def plain_kept(scores: Sequence[float], capacity: int, sinks: int, image: Collection[int] | None) -> list[int]:
    """Positions that stay; with `image`, tokens outside it go last."""
    last = len(scores) - 1
    protected = {*range(min(sinks, last + 1)), last}
    text = set() if image is None else {t for t in range(last + 1) if t not in image}
    ranked = sorted(range(last + 1), key=lambda t: (t not in protected, t not in text, -scores[t], t))
    return sorted(ranked[:capacity])


def plain_margin(scores: Sequence[float], kept: Sequence[int]) -> float:
    """How much less the best dropped token has than the worst kept one that could be dropped."""
    gone = [scores[t] for t in range(len(scores)) if t not in kept]
    worse = [scores[t] - max(gone) for t in kept if scores[t] > max(gone)]
    return min(worse, default=1.0)


def plain_nearest(kept: Sequence[int], position: int) -> int:
    """Of two equally near ones the earlier."""
    return min(kept, key=lambda k: (abs(k - position), k))


def plain_merged(kept: Sequence[int], rows: Sequence[Tensor]) -> list[Tensor]:
    """Every kept row as the mean of itself and of the dropped ones nearest to it."""
    groups: dict[int, list[Tensor]] = {k: [] for k in kept}
    for position, row in enumerate(rows):
        groups[plain_nearest(kept, position)].append(row)
    return [torch.stack(groups[k]).mean(0) for k in kept]


def released(scores: Tensor, rows: Tensor, num_forgotten: int, sinks: int) -> tuple[list[int], Tensor]:
    """What the authors' code keeps of one layer, and the rows [n, D] it ends with; scores [T], rows [T, D].

    But for sinks that it takes for dropped tokens: they are not merged here.
    """
    num_tokens = len(scores)
    order = torch.argsort(scores[sinks : num_tokens - 1])
    chosen = [i + sinks for i, rank in enumerate(order.tolist()) if rank > num_forgotten]
    thrown = [i for i, rank in enumerate(order.tolist()) if rank <= num_forgotten]  # an index without the sinks
    groups = {k: [rows[k]] for k in chosen}
    for t in thrown:
        if t >= sinks:
            groups[plain_nearest(chosen, t)].append(rows[t])
    kept = [*range(sinks), *chosen, num_tokens - 1]
    return kept, torch.stack([torch.stack(groups[k]).mean(0) if k in groups else rows[k] for k in kept])


class PlainElastic:
    """The rule, with a share of the prompt."""

    def __init__(self, budget: float, sinks: int = 4, distance: int = 25) -> None:
        self._budget, self._sinks, self._distance = budget, sinks, distance
        self.margin = float("inf")

    def settle(self, layers: list[list[Head]]) -> None:
        """All heads of a layer keep the same, by the mean of what their query heads saw."""
        num_tokens = len(layers[0][0].positions)
        self._capacity = max(self._sinks + 1, int(num_tokens * self._budget))
        if num_tokens <= self._capacity:
            return
        for layer in layers:
            scores = torch.tensor([head.scores for head in layer], dtype=torch.float64).mean(0).tolist()
            kept = plain_kept(scores, self._capacity, self._sinks, None)
            self.margin = min(self.margin, plain_margin(scores, kept))
            for head in layer:
                head.keys, head.values = plain_merged(kept, head.keys), plain_merged(kept, head.values)
                head.positions, head.scores = list(kept), [0.0] * len(kept)

    def after(self, layers: list[list[Head]]) -> None:
        """The token at the fixed index leaves."""
        for head in (head for layer in layers for head in layer):
            if len(head.positions) > self._capacity:
                head.take(max(self._sinks, self._capacity - self._distance))

    def answer(self, layer: int, query_head: int, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Attention's answer."""
        return out
