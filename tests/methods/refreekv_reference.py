"""ReFreeKV's cut, found by trying every number of tokens, in double precision."""

import math

import numpy as np
import numpy.typing as npt

from tests.methods.snapkv_reference import plain_pooled

Numbers = npt.NDArray[np.floating]


def plain_order(
    ranking: str, num_prompt: int, *, mass: Numbers | None = None, rows: Numbers | None = None, window: int = 32,
    kernel: int = 5, sinks: int = 4,
) -> list[int]:  # fmt: skip
    """Candidates of one KV head, least important first: mass [T], rows [G, W, T] of the window."""
    if ranking == "streaming":
        return list(range(sinks, num_prompt))
    older = max(0, num_prompt - window)
    if older == 0:
        return []
    if ranking == "h2o":
        assert mass is not None
        scores = mass[:older]
    else:
        assert rows is not None
        scores = plain_pooled(rows.sum((0, 1))[:older], kernel)
    return sorted(range(older), key=lambda t: (scores[t], -t))


def plain_losses(row: Numbers, orders: list[list[int]]) -> list[float]:
    """Share of the norm of the last row [H, G, T] that is lost without the m least of each head's candidates."""
    norms = []
    for m in range(len(orders[0])):
        left = [
            math.sqrt(sum(float(row[h, g, t]) ** 2 for t in order[m:]))
            for h, order in enumerate(orders)
            for g in range(row.shape[1])
        ]
        norms.append(sum(left) / len(left))
    if norms[0] == 0:  # in a layer whose window ends before the candidates nothing can be lost
        return [0.0] * len(norms)
    return [(norms[0] - norm) / norms[0] for norm in norms]


def plain_cut(row: Numbers, orders: list[list[int]], threshold: float) -> tuple[list[set[int]], float]:
    """Tokens that each head of a layer drops, and how close the decision was."""
    if not orders[0]:
        return [set() for _ in orders], math.inf
    losses = plain_losses(row, orders)
    cut = max(m for m, loss in enumerate(losses) if loss <= threshold)
    return [set(order[:cut]) for order in orders], min(abs(loss - threshold) for loss in losses)
