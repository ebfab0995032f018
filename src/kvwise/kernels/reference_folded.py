"""Tokens that have left, in plain torch: what `fold` and `merge_folded` mean."""

import torch
from torch import Tensor

from kvwise.kernels.folded import FoldedStates


class ReferenceFolding:
    """Plain torch `fold` and `merge_folded`; see `kvwise.kernels.base.Kernels`."""

    def fold(
        self, states: FoldedStates, rows: Tensor, layers: Tensor, heads: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Tokens of one head are mapped at once, those of one state added at once."""
        if not len(rows):
            return
        num_layers, num_heads = states.weights.shape[1:3]
        kinds, place = _grouped(layers * num_heads + heads)
        features = states.maps.psi(kinds, _padded(keys.float(), place))[place]
        which, place = _grouped((rows * num_layers + layers) * num_heads + heads)
        features = _padded(features, place)
        states.values.flatten(0, 2)[which] += features.transpose(1, 2) @ _padded(values.float(), place)
        states.weights.flatten(0, 2)[which] += features.sum(1)

    def merge_folded(
        self, states: FoldedStates, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """In logarithms, as the paper's code does, but without its floor of 1e-6 under `phi z`."""
        phi = states.maps.phi(layer, queries.float().transpose(0, 1)).transpose(0, 1)  # [B, Hq, R]
        phi = phi.reshape(len(rows), states.weights.shape[2], -1, phi.shape[-1])  # [B, H, G, R]
        weight = (phi @ states.weights[rows, layer][..., None])[..., 0].flatten(1)  # [B, Hq]
        share = torch.sigmoid(weight.log() - lse)[..., None]
        mean = (phi @ states.values[rows, layer]).flatten(1, 2) / weight[..., None]
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
