"""VL-Cache's layer budgets and choice from full attention matrices, in loops and fractions."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.floating]
Spans = tuple[tuple[int, int], ...]


def plain_first_row(num_prompt: int, spans: Spans, observed: int) -> int:
    """The first row behind the last image; of the last `observed` if none is."""
    behind = max((stop for _, stop in spans), default=num_prompt)
    return behind if behind < num_prompt else max(0, num_prompt - observed)


def plain_density(rows: Numbers, first_row: int, p: float) -> Fraction:
    """Share of what rows [H, G, W, T] can see (row i up to token first_row + i) that is not below p of the largest."""
    dense = seen = 0
    for head in rows.reshape(-1, *rows.shape[2:]):
        for i, row in enumerate(head):
            visible = row[: first_row + i + 1]
            dense += int((visible >= np.float32(p) * visible.max()).sum())
            seen += len(visible)
    return Fraction(dense, seen)


def plain_numbers(densities: list[Fraction], num_prompt: int, capacity: int) -> list[int]:
    """Tokens by layer: beta_l = clip(d_l / sum(d) * alpha * L, 1 %, 1) of the prompt, alpha in whole tokens."""
    alpha, num_layers = Fraction(capacity, num_prompt), len(densities)
    least = min(max(Fraction(1, 100), Fraction(1, num_prompt)), alpha)
    beta = [min(max(d / sum(densities) * alpha * num_layers, least), Fraction(1)) for d in densities]
    if sum(beta) > alpha * num_layers:
        shrink = (alpha - least) * num_layers / (sum(beta) - least * num_layers)
        beta = [least + (b - least) * shrink for b in beta]
    return [int(b * num_prompt) for b in beta]


def plain_choice(scores: Numbers, num_kept: int, recent: float) -> list[int]:
    """Positions one head keeps by scores [T] of the prompt."""
    latest = max(1, int(num_kept * recent))
    older = range(len(scores) - latest)
    best = sorted(older, key=lambda t: (-scores[t], t))[: num_kept - latest]
    return sorted([*best, *range(len(scores) - latest, len(scores))])


def plain_kept(
    attention: list[Numbers], num_prompt: int, capacity: int, first_row: int, p: float, recent: float
) -> list[list[list[int]]]:
    """Positions by layer and head; attention of each layer [H, G, W, T] from rows `first_row` on."""
    if num_prompt <= capacity:
        return [[list(range(num_prompt))] * layer.shape[0] for layer in attention]
    numbers = plain_numbers([plain_density(layer, first_row, p) for layer in attention], num_prompt, capacity)
    return [
        [plain_choice(head[:num_prompt], number, recent) for head in layer.sum((1, 2))]
        for layer, number in zip(attention, numbers, strict=True)
    ]
