"""The feature maps of LESS: small trained functions whose product stands in for the exponential of a logit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import gelu

from kvwise.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FILE = "less.safetensors"  # beside a model's weights
RANK = 8  # R, the features of a token
START = 1e-4  # of both scales: so small that a residual that nobody trained adds next to nothing


@dataclass(frozen=True, slots=True)
class FeatureMaps:
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
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> FeatureMaps:
        """The same on `device`."""
        return FeatureMaps(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def save(self, path: Path, about: dict[str, object]) -> None:
        """Write them with what is to be known `about` them; a reader sees the whole file or none."""
        part = path.with_name(f"{path.name}.part")
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, part, metadata={"about": json.dumps(about)})
        part.chmod(0o644)
        part.replace(path)


def untrained(num_layers: int, num_query_heads: int, num_kv_heads: int, head_dim: int, hidden: int) -> FeatureMaps:
    """What training starts with; drawn from a seed of its own, whatever else has been drawn."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3 / (rows + columns))
        return (2 * torch.rand(num_layers, heads, rows, columns, generator=generator) - 1) * bound

    return FeatureMaps(
        query_in=draw(num_query_heads, head_dim, hidden),
        query_out=draw(num_query_heads, hidden, RANK),
        key_in=draw(num_kv_heads, head_dim, hidden),
        key_out=draw(num_kv_heads, hidden, RANK),
        scale=torch.full((num_layers, num_kv_heads, 1, RANK), START),
        interaction=draw(num_kv_heads, RANK, RANK),
        interaction_scale=torch.full((num_layers, num_kv_heads, 1, RANK), START),
    )


def load(path: Path, num_layers: int, num_query_heads: int, num_kv_heads: int, head_dim: int) -> FeatureMaps:
    """Read what `FeatureMaps.save` wrote; UsageError if it is no such file, or that of a model of other shape."""
    names = [field.name for field in fields(FeatureMaps)]
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is no file of LESS kernels ({error}): train it anew with kvwise train less"
        ) from error
    maps = FeatureMaps(**found)
    *_, hidden, rank = maps.query_out.shape
    expected = (num_layers, num_query_heads, num_kv_heads, head_dim)
    told = (*maps.query_in.shape[:2], maps.key_in.shape[1], maps.query_in.shape[2])
    if told != expected or not _fits(maps, hidden, rank):
        raise UsageError(
            f"{path} holds LESS kernels of {told} layers, query heads, KV heads and head size, and the model has"
            f" {expected}: train its own with kvwise train less"
        )
    return maps


def _fits(maps: FeatureMaps, hidden: int, rank: int) -> bool:
    layers, heads, dim = maps.key_in.shape[:3]
    return (
        maps.query_in.shape[2:] == (dim, hidden)
        and maps.key_in.shape == (layers, heads, dim, hidden)
        and maps.key_out.shape == (layers, heads, hidden, rank)
        and maps.scale.shape == maps.interaction_scale.shape == (layers, heads, 1, rank)
        and maps.interaction.shape == (layers, heads, rank, rank)
    )
