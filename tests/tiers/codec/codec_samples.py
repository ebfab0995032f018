"""KV blocks for the tests of codecs, and reading back what a codec wrote."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvwise.tiers.codec.cachegen import CacheGenCodec, CacheGenOptions
from kvwise.tiers.codec.int4 import Int4
from kvwise.tiers.codec.int4z import Int4z
from kvwise.tiers.codec.int8 import Int8

Blocks = tuple[Tensor, Tensor]
SHAPE = (3, 2, 16, 32)  # L, H, block_size, D


def blocks(num: int, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> Blocks:
    """Keys, values [num, L, H, block_size, D]: channels of other means and widths, tokens like the last."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        noise = torch.randn((num, *shape), generator=generator)
        walk = noise.cumsum(3) * 0.3 + noise
        width = torch.rand((shape[0], shape[1], 1, shape[3]), generator=generator) * 3 + 0.1
        mean = torch.randn((shape[0], shape[1], 1, shape[3]), generator=generator)
        found.append((walk * width + mean).to(dtype))
    return found[0], found[1]


def lossy(shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Any]:
    """One of each lossy codec, profiled where it can be."""
    keys, values = blocks(4, shape, dtype, seed=7)
    return [
        Int8(),
        Int4(),
        Int4z(),
        Int4z.profile(keys, values),
        CacheGenCodec.profile(keys, values, CacheGenOptions(levels=4)),
        CacheGenCodec.profile(keys, values, CacheGenOptions(levels=2, mode="released")),
    ]


def segments(codec: Any, keys: Tensor, values: Tensor, level: int = 0) -> list[bytes]:
    """The segments of one block, whole."""
    return [b"".join(pieces) for pieces in codec.encode(keys, values, level)]


def back(codec: Any, parts: Sequence[bytes], like: Tensor, level: int = 0) -> Blocks:
    """Keys, values of one block from its segments."""
    keys, values = torch.full_like(like, 99), torch.full_like(like, 99)
    for layer, part in enumerate(parts):
        codec.decode(part, layer, keys[layer], values[layer], level)
    return keys, values


def round_trip(codec: Any, keys: Tensor, values: Tensor, level: int = 0) -> Blocks:
    """What comes back of one block."""
    return back(codec, segments(codec, keys, values, level), keys, level)
