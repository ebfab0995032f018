"""States that stand for tokens that have left, and the feature maps through which queries and keys meet in them."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Maps:
    """phi of queries, by query head, and psi of keys, by KV head (LESS, arXiv 2402.09398), float32.

    `phi(q) = |gelu(gelu(q A) B)|`, and with `y = |d| gelu(gelu(k A) B)`, `psi(k) = |y + (y I) e|`, so that
    `phi(q) . psi(k)` is like `exp(logit)`. The paper's models have as many KV heads as query heads; where query
    heads share a KV head, each has a phi of its own, and what it meets is folded once.
    """

    query_in: Tensor  # A [L, Hq, D, hidden]
    query_out: Tensor  # B [L, Hq, hidden, R]
    key_in: Tensor  # A [L, H, D, hidden]
    key_out: Tensor  # B [L, H, hidden, R]
    scale: Tensor  # d [L, H, 1, R]
    interaction: Tensor  # I [L, H, R, R]
    interaction_scale: Tensor  # e [L, H, 1, R]

    def phi(self, layer: int, queries: Tensor) -> Tensor:
        """Features [Hq, n, R] of queries [Hq, n, D]."""
        return gelu(gelu(queries @ self.query_in[layer]) @ self.query_out[layer]).abs()

    def psi(self, heads: Tensor, keys: Tensor) -> Tensor:
        """Features [K, n, R] of rotated keys [K, n, D]; heads int64 [K], ascending, counts through all layers."""
        first, last = int(heads[0]), int(heads[-1])
        # A run of heads, as a layer's or all of them, is read where it lies.
        which = slice(first, last + 1) if last - first + 1 == len(heads) else heads
        hidden = gelu(keys @ self.key_in.flatten(0, 1)[which])
        y = self.scale.flatten(0, 1)[which].abs() * gelu(hidden @ self.key_out.flatten(0, 1)[which])
        crossed = y @ self.interaction.flatten(0, 1)[which]
        return (y + crossed * self.interaction_scale.flatten(0, 1)[which]).abs()

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True, slots=True)
class FoldedStates:
    """H = sum psi(k)^T v and z = sum psi(k) over the tokens that have left, by request (row), layer and KV head.

    Raises UsageError where shapes do not fit or a tensor is not contiguous float32, so that kernels need not look.
    """

    values: Tensor  # H float32 [rows, L, H, R, D]
    weights: Tensor  # z float32 [rows, L, H, R]
    maps: Maps
    # For native kernels: D, hidden, R, rows, L, H, Hq, addresses of values, weights and the maps' tensors, in order.
    native_fields: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        maps = self.maps
        num_layers, num_query_heads, dim, hidden = maps.query_in.shape
        num_rows, _, num_heads, rank = self.weights.shape
        by_layer = (num_layers, num_heads)
        wanted = {
            "values": (num_rows, *by_layer, rank, dim),
            "weights": (num_rows, *by_layer, rank),
            "query_in": (num_layers, num_query_heads, dim, hidden),
            "query_out": (num_layers, num_query_heads, hidden, rank),
            "key_in": (*by_layer, dim, hidden),
            "key_out": (*by_layer, hidden, rank),
            "scale": (*by_layer, 1, rank),
            "interaction": (*by_layer, rank, rank),
            "interaction_scale": (*by_layer, 1, rank),
        }
        for name, tensor in {"values": self.values, "weights": self.weights, **maps.tensors()}.items():
            if tensor.shape != wanted[name] or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise UsageError(f"{name} {tuple(tensor.shape)} {tensor.dtype} must be float32 {wanted[name]}")
        sizes = (dim, hidden, rank, num_rows, num_layers, num_heads, num_query_heads)
        tensors = (self.values, self.weights, *maps.tensors().values())
        object.__setattr__(self, "native_fields", (*sizes, *(tensor.data_ptr() for tensor in tensors)))
        if num_query_heads % num_heads:
            raise UsageError(f"{num_query_heads} query heads are not a multiple of {num_heads} KV heads")
