"""Budgets by layer and by head in fractions and sorted lists."""

import math
from fractions import Fraction

Table = list[list[float]]


def plain_layers(layers: str, chosen: int, tokens: int, num_layers: int) -> list[int]:
    """Numbers of tokens by layer: all `chosen`, or a straight line through that mean, where there are more tokens."""
    if layers == "uniform" or num_layers == 1 or chosen >= tokens:
        return [chosen] * num_layers
    last = Fraction(chosen, 20)
    first = 2 * chosen - last
    if first > tokens:
        first, last = Fraction(tokens), Fraction(2 * chosen - tokens)
    step = (first - last) / (num_layers - 1)
    return [math.floor(first - layer * step) for layer in range(num_layers)]


def plain_heads(heads: str, scores: Table, chosen: int) -> list[set[int]]:
    """Tokens chosen by each head of a layer: the best of its own, or of all heads together with a floor."""
    own = [sorted(range(len(row)), key=lambda t: (-row[t], t)) for row in scores]
    if heads == "uniform":
        return [set(order[:chosen]) for order in own]
    found = [set(order[: chosen * 20 // 100]) for order in own]
    others = [(-row[t], h, t) for h, row in enumerate(scores) for t in range(len(row)) if t not in found[h]]
    num_others = chosen * len(scores) - sum(map(len, found))
    for _, h, t in sorted(others)[:num_others]:
        found[h].add(t)
    return found


def plain_margin(heads: str, scores: Table, chosen: int) -> float:
    """How far the closest decision was from a tie."""
    rows = scores if heads == "uniform" else [[score for row in scores for score in row]]
    per_row = chosen if heads == "uniform" else chosen * len(scores)
    margin = math.inf
    for row in rows:
        order = sorted(row, reverse=True)
        if 0 < per_row < len(order):
            margin = min(margin, order[per_row - 1] - order[per_row])
    if heads == "adakv":  # the floor, too, is a decision
        for row in scores:
            order, floor = sorted(row, reverse=True), chosen * 20 // 100
            if 0 < floor < len(order):
                margin = min(margin, order[floor - 1] - order[floor])
    return margin
