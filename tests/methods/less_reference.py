"""LESS written down plainly from its description: H2O's rule, and a state for what has left. See plain_run."""

import math

import torch
from torch import Tensor

from kvwise.methods.retention.feature_maps import FeatureMaps
from tests.methods.plain_run import Head


def gelu(x: Tensor) -> Tensor:
    """x times the probability that a normal number is below it."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_phi(maps: FeatureMaps, layer: int, query_head: int, query: Tensor) -> Tensor:
    """[R]."""
    return gelu(gelu(query @ maps.query_in[layer, query_head]) @ maps.query_out[layer, query_head]).abs()


def plain_psi(maps: FeatureMaps, layer: int, head: int, key: Tensor) -> Tensor:
    """[R]."""
    y = maps.scale[layer, head, 0].abs() * gelu(gelu(key @ maps.key_in[layer, head]) @ maps.key_out[layer, head])
    return (y + (y @ maps.interaction[layer, head]) * maps.interaction_scale[layer, head, 0]).abs()


class PlainLess:
    """The rule, with a share of the prompt. H [R, D] and z [R] by layer and KV head."""

    def __init__(self, maps: FeatureMaps, budget: float, recent: float = 0.5) -> None:
        self._maps, self._budget, self._recent_share = maps, budget, recent
        self.margin = float("inf")
        layers, heads, _, rank = maps.scale.shape
        self._group = maps.query_in.shape[1] // heads
        dim = maps.key_in.shape[2]
        self.H = [[torch.zeros(rank, dim) for _ in range(heads)] for _ in range(layers)]
        self.z = [[torch.zeros(rank) for _ in range(heads)] for _ in range(layers)]

    def settle(self, layers: list[list[Head]]) -> None:
        """The heavy hitters and the latest stay."""
        self._capacity = max(2, int(len(layers[0][0].positions) * self._budget))
        self._recent = max(1, int(self._capacity * self._recent_share))
        self.after(layers)

    def after(self, layers: list[list[Head]]) -> None:
        """Who received least, outside the latest, leaves and is folded."""
        for layer, heads in enumerate(layers):
            for h, head in enumerate(heads):
                while len(head.positions) > self._capacity:
                    newest = max(head.positions)
                    older = [i for i, p in enumerate(head.positions) if p <= newest - self._recent]
                    ranked = sorted(older, key=lambda i: head.scores[i])
                    if len(ranked) > 1:
                        self.margin = min(self.margin, head.scores[ranked[1]] - head.scores[ranked[0]])
                    key, value = head.take(ranked[0])
                    psi = plain_psi(self._maps, layer, h, key)
                    self.H[layer][h] += torch.outer(psi, value)
                    self.z[layer][h] += psi

    def answer(self, layer: int, query_head: int, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """One softmax over what stays and what has left: the formula as it stands."""
        head = query_head // self._group
        phi = plain_phi(self._maps, layer, query_head, query)
        stays, left = lse.exp(), phi @ self.z[layer][head]
        return (stays * out + phi @ self.H[layer][head]) / (stays + left)
