"""The residual of LESS: tokens that have left live on in a small state of fixed size per layer and KV head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvwise.methods.retention.base import Residual, ResidualShape

if TYPE_CHECKING:
    from torch import Tensor

    from kvwise.methods.retention.feature_maps import FeatureMaps

_PIECE = 2**24  # numbers of a hidden layer at once


class Folded(Residual):
    """H = sum psi(k)^T v [R, D] and z = sum psi(k) [R] over the tokens that have left, by row, layer and KV head.

    float32: H [rows, L, H, R, D] and z [rows, L, H, R], device memory for all rows there can be.
    """

    def __init__(self, shape: ResidualShape, maps: FeatureMaps) -> None:
        self._maps = maps.to(shape.device)
        self._num_heads = shape.num_kv_heads
        rank = maps.scale.shape[-1]
        state = (shape.max_rows, shape.num_layers, shape.num_kv_heads, rank)
        self.values = torch.zeros((*state, shape.head_dim), device=shape.device)
        self.weights = torch.zeros(state, device=shape.device)

    @property
    def num_bytes(self) -> int:
        """The states of all rows and the maps."""
        return self.values.nbytes + self.weights.nbytes + self._maps.num_bytes

    def start(self, row: int) -> None:
        """Nothing has left."""
        self.values[row] = 0
        self.weights[row] = 0

    def fold(self, rows: Tensor, layers: Tensor, heads: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add what leaves; pieces bound the memory that it takes."""
        count = max(1, _PIECE // self._maps.key_in.shape[-1])
        kinds = layers * self._num_heads + heads
        for first in range(0, len(rows), count):
            piece = slice(first, first + count)
            self._add(rows[piece], kinds[piece], keys[piece], values[piece])

    def _add(self, rows: Tensor, heads: Tensor, keys: Tensor, values: Tensor) -> None:
        """`heads` count through all layers. Tokens of one head are mapped at once, those of one state added at once."""
        kinds, place = _grouped(heads)
        features = self._maps.psi(kinds, _padded(keys.float(), place))[place]
        states, place = _grouped(rows * self._maps.scale.shape[:2].numel() + heads)
        features = _padded(features, place)
        self.values.flatten(0, 2)[states] += features.transpose(1, 2) @ _padded(values.float(), place)
        self.weights.flatten(0, 2)[states] += features.sum(1)

    def merge(self, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """One softmax over what stays and what has left: `(e^lse out + phi H) / (e^lse + phi z)`.

        That is what the card of the paper's code computes in logarithms, without its floor of 1e-6 under `phi z`: where
        nothing has left, `out` is what it was, to the bit.
        """
        phi = self._maps.phi(layer, queries.float().transpose(0, 1)).transpose(0, 1)  # [B, Hq, R]
        phi = phi.reshape(len(rows), self._num_heads, -1, phi.shape[-1])  # [B, H, G, R]
        weight = (phi @ self.weights[rows, layer][..., None])[..., 0].flatten(1)  # [B, Hq]
        share = torch.sigmoid(weight.log() - lse)[..., None]
        mean = (phi @ self.values[rows, layer]).flatten(1, 2) / weight[..., None]
        merged = out.float() + share * (mean - out.float())
        return torch.where(share > 0, merged, out.float()).to(out.dtype)


def _grouped(ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The different ids [K], and of each of ids [n] its group and its number there."""
    different, group, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    number = torch.empty_like(order)
    starts = counts.cumsum(0) - counts
    number[order] = torch.arange(len(ids), device=ids.device) - starts[group[order]]
    return different, (group, number)


def _padded(rows: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """Rows [n, d] side by side in their groups: [K, most, d], zeros behind. psi of zeros is zero."""
    group, number = place
    padded = rows.new_zeros((int(group.max()) + 1, int(number.max()) + 1, rows.shape[-1]))
    padded[place] = rows
    return padded
