"""How dropped tokens live on in kept ones: which kept token takes one in, and with what weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-20  # a squared distance that is none


def nearest(kept: Tensor) -> Tensor:
    """Of each position of kept [..., T] the nearest kept one; of two equally near ones the earlier: int64 [..., T].

    Where nothing is kept, a position names itself.
    """
    num_tokens = kept.shape[-1]
    at = torch.arange(num_tokens, device=kept.device).expand(kept.shape)
    before = at.masked_fill(~kept, -2 * num_tokens).cummax(-1).values
    after = at.masked_fill(~kept, 3 * num_tokens).flip(-1).cummin(-1).values.flip(-1)
    found = torch.where(at - before <= after - at, before, after)
    return torch.where(kept.any(-1, keepdim=True), found, at)


def mean_weights(target: Tensor, times: Tensor) -> Tensor:
    """Weights [..., T] with which a target becomes the mean of its sources; source t counts `times[t]` times."""
    count = torch.zeros_like(times).scatter_add_(-1, target, times)
    return times / count.gather(-1, target).clamp(min=1)


def neighbour_cosines(keys: Tensor) -> Tensor:
    """Cosine of each key [H, T, D] and the next: [H, T - 1]."""
    return cosine_similarity(keys[:, :-1], keys[:, 1:], dim=-1)


def gaussian_sets(joined: Tensor, keys: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KVMerger's merging (arXiv 2407.08454) of runs of neighbours -> target [H, T], weights of K and of V.

    `joined` bool [H, T - 1] says which tokens are in one set with the next; keys [H, T, D]; mass [H, T]. The target
    of a set is its pivot p, the token with the most mass (of equals the first). With d_i the squared distance of key i
    from the pivot's, `g_i = exp(-d_i / (2 sigma^2))`, the key's weight is `g_i / sum g` and the value's |S| times that.
    `sigma = sum g / (sqrt(2) |S|)` refers to itself: it is taken from the g of the set's own mean square distance.
    """
    number = torch.nn.functional.pad((~joined).long(), (1, 0)).cumsum(-1)  # of the set that each token is in
    size = _sums(number, torch.ones_like(mass))
    pivot = _pivots(number, mass)
    distance = (keys - keys.gather(1, pivot[..., None].expand_as(keys))).square().sum(-1)
    g = torch.exp(-distance / (2 * (_sums(number, distance) / size).clamp(min=_TINY)))
    sigma = _sums(number, g) / (math.sqrt(2) * size)
    g = torch.exp(-distance / (2 * sigma.square()))
    weights = g / _sums(number, g)
    return pivot, weights, weights * size


def _sums(number: Tensor, amounts: Tensor) -> Tensor:
    """The sum over each token's set, told to each of its tokens: [H, T]."""
    return torch.zeros_like(amounts).scatter_add_(-1, number, amounts).gather(-1, number)


def _pivots(number: Tensor, mass: Tensor) -> Tensor:
    """The token with the most mass of each token's set."""
    most = torch.zeros_like(mass).scatter_reduce_(-1, number, mass, "amax", include_self=False).gather(-1, number)
    num_tokens = mass.shape[-1]
    at = torch.arange(num_tokens, device=mass.device).expand(mass.shape)
    first = torch.full_like(number, num_tokens)
    first.scatter_reduce_(-1, number, at.masked_fill(mass < most, num_tokens), "amin")
    return first.gather(-1, number)
