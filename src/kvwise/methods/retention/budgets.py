"""Budgets that differ: how methods that score tokens share what may stay among layers, and among a layer's heads.

Two tables of names that are options of those methods: `LAYERS` says how many tokens a head of each layer may choose,
`HEADS` chooses them among the heads of a layer. Both keep the mean over layers and heads within the uniform number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STEEPNESS = 20  # beta of PyramidKV: the uniform number is this many times the last layer's
FLOOR = 0.2  # alpha of Ada-KV: the share of the uniform number that no head goes below


def uniform_layers(num_chosen: int, num_tokens: int, num_layers: int) -> Tensor:
    """Every layer chooses `num_chosen` of `num_tokens` tokens: int64 [L]."""
    return torch.full((num_layers,), num_chosen)


def pyramid(num_chosen: int, num_tokens: int, num_layers: int) -> Tensor:
    """PyramidKV, arXiv 2406.02069 section 4.2: numbers int64 [L] that fall in a straight line from first to last layer.

    The last layer chooses `num_chosen` / 20, the first as much above the mean as the last lies below; if that is more
    than the `num_tokens` there are, the first chooses all of them and the line is flatter. Rounded down.
    """
    # In twentieths of a token, so that whole numbers come out whole.
    first = min(2 * STEEPNESS * num_chosen - num_chosen, STEEPNESS * num_tokens)
    last = 2 * STEEPNESS * num_chosen - first
    if num_layers == 1 or first <= last:
        return uniform_layers(num_chosen, num_tokens, num_layers)
    steps = num_layers - 1
    return (first * steps - torch.arange(num_layers) * (first - last)) // (STEEPNESS * steps)


def each_head(scores: Tensor, num_chosen: Tensor) -> Tensor:
    """The best tokens of every head, `num_chosen` int64 [...] each: bool like the scores [..., H, T]."""
    return best(scores, num_chosen[..., None].expand(scores.shape[:-1]))


def adakv(scores: Tensor, num_chosen: Tensor) -> Tensor:
    """Ada-KV, arXiv 2407.11550: the best of all heads of a layer together, `num_chosen` int64 [...] times H.

    Every head is sure of its own best, a fifth of `num_chosen`; the paper mixes numbers per head instead, four parts
    found together and one part uniform, which guarantees the same. Scores [..., H, T] -> bool [..., H, T]; of equal
    scores those of the earlier head stay, and of its tokens the earlier.
    """
    sure = each_head(scores, (num_chosen.double() * FLOOR).long())
    together = scores.masked_fill(sure, torch.inf).flatten(-2)
    return best(together, num_chosen * scores.shape[-2]).reshape(scores.shape)


def best(scores: Tensor, num_chosen: Tensor) -> Tensor:
    """The `num_chosen` int64 [...] best of scores [..., T], all if there are fewer; of equals the earlier: bool."""
    num_chosen = num_chosen.to(scores.device).clamp(max=scores.shape[-1])[..., None]
    most = int(num_chosen.max())
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Sorting everything would take twenty times as long.
    least = scores.topk(most, dim=-1).values.gather(-1, (num_chosen - 1).clamp(min=0))
    above, tied = scores > least, scores == least
    return above | (tied & (tied.cumsum(-1) <= num_chosen - above.sum(-1, keepdim=True)))


LAYERS: Mapping[str, Callable[[int, int, int], Tensor]] = {"uniform": uniform_layers, "pyramid": pyramid}
HEADS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"uniform": each_head, "adakv": adakv}
