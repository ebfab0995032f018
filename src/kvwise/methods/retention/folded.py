"""The residual of LESS: tokens that have left live on in a small state of fixed size per layer and KV head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvwise.kernels.folded import FoldedStates
from kvwise.kernels.reference import ReferenceKernels
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
        self._kernels = shape.kernels or ReferenceKernels()
        rank = maps.scale.shape[-1]
        state = (shape.max_rows, shape.num_layers, shape.num_kv_heads, rank)
        self.values = torch.zeros((*state, shape.head_dim), device=shape.device)
        self.weights = torch.zeros(state, device=shape.device)
        self._states = FoldedStates(self.values, self.weights, self._maps)

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
        for first in range(0, len(rows), count):
            piece = [part[first : first + count] for part in (rows, layers, heads, keys, values)]
            self._kernels.fold(self._states, *piece)

    def merge(self, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """One softmax over what stays and what has left; where nothing has left, `out` to the bit."""
        return self._kernels.merge_folded(self._states, layer, rows, queries, out, lse)
