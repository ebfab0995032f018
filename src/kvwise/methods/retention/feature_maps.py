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

from kvwise.core.errors import UsageError
from kvwise.kernels.folded import Maps

if TYPE_CHECKING:
    from torch import Tensor

FILE = "less.safetensors"  # beside a model's weights
RANK = 8  # R, the features of a token
START = 1e-4  # of both scales: so small that a residual that nobody trained adds next to nothing


@dataclass(frozen=True, slots=True)
class FeatureMaps(Maps):
    """Maps that come from a file, or from nothing, and go to one."""

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
