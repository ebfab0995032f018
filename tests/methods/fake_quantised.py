"""Decoding over a cache that is encoded, densely: full-precision KV that is read as the encoding would have it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.methods.dense_reference import Dense
from tests.methods.encoding_reference import (
    Floats,
    per_channel,
    per_token,
    plain_channels,
    plain_double_buffer,
    plain_float8,
    plain_read,
    plain_split,
)

Read = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Encoded:
    """An encoding in plain numpy: tokens whose keys and values are sealed, and what sealed [T, D] are read as."""

    sealed: Callable[[int, int], tuple[int, int]]  # tokens so far, tokens of the prompt
    keys: Read
    values: Read
    ratio: float = 0.0
    observed: int = 0
    native_layers: int = 0

    def counts(self, layer: int, num_tokens: int, num_prompt: int) -> tuple[int, int]:
        """Sealed keys and values of a layer when there are so many tokens."""
        return (0, 0) if layer < self.native_layers else self.sealed(num_tokens, num_prompt)


def _groups(size: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda num_tokens, _: (num_tokens // size * size,) * 2


def _kivi(residual: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda num_tokens, _: (num_tokens // residual * residual, max(0, num_tokens - residual))


def _coded(bits: int, group: int) -> tuple[Read, Read]:
    read = partial(plain_read, bits=bits)
    return partial(per_channel, group=group, read=read), partial(per_token, group=group, read=read)


def _split(which: int) -> tuple[Read, Read]:
    def read(groups: Floats) -> Floats:
        return plain_split(groups)[which]

    return partial(per_channel, group=16, read=read), partial(per_token, group=16, read=read)


def _float8(tokens: Floats) -> Floats:
    return np.concatenate([plain_float8(tokens[first : first + 32]) for first in range(0, len(tokens), 32)])


def _whole(tokens: Floats) -> Floats:
    return tokens


# What the lines mean, said once more and by hand.
ENCODED = {
    "fp8(group=32)": Encoded(_groups(32), _float8, _float8),
    "int8(group=32)": Encoded(_groups(32), *_coded(8, 32)),
    "int4(group=32, value_group=8)": Encoded(_groups(32), _coded(4, 32)[0], _coded(4, 8)[1]),
    "int4(group=32, key_bits=8, value_bits=2, native_layers=1)": Encoded(
        _groups(32), _coded(8, 32)[0], _coded(2, 32)[1], native_layers=1
    ),
    "int4(group=32, value_bits=16)": Encoded(_groups(32), _coded(4, 32)[0], _whole),
    "kivi(bits=4, group=16, residual=32)": Encoded(_kivi(32), *_coded(4, 16)),
    "kivi(bits=3, group=16, residual=64, native_layers=2)": Encoded(_kivi(64), *_coded(3, 16), native_layers=2),
    "hierarchical(group=16)": Encoded(lambda n, _: (plain_double_buffer(n, 16),) * 2, *_split(0)),
    "hierarchical(group=16, reader=4)": Encoded(lambda n, _: (plain_double_buffer(n, 16),) * 2, *_split(1)),
    "think(ratio=0.5, recent=9, observed=8)": Encoded(
        lambda _, prompt: (max(0, prompt - 9),) * 2, _whole, _whole, ratio=0.5, observed=8
    ),
}


class FakeQuantised(Dense):
    """One sequence whose prompt attends in full precision, and whose output reads what is sealed by then."""

    def __init__(self, loaded: Any, encoded: Encoded) -> None:
        super().__init__(loaded)
        self._encoded = encoded
        self._num_prompt: dict[int, int] = {}
        self.channels: dict[tuple[int, int], list[int]] = {}

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        if layer not in self._kv:
            self._num_prompt[layer] = len(keys)
            self._choose_channels(layer, queries, keys)
            return super().attend(layer, queries, keys, values, scale=scale, window=window, softcap=softcap)
        old_keys, old_values = self._kv[layer]
        exact = torch.cat([old_keys, keys]), torch.cat([old_values, values])
        self._kv[layer] = self._read(layer, old_keys, old_values)
        out = super().attend(layer, queries, keys, values, scale=scale, window=window, softcap=softcap)
        self._kv[layer] = exact
        return out

    def _choose_channels(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        num_heads = keys.shape[1]
        if self._encoded.ratio == 0:
            return
        last = queries[-self._encoded.observed :].unflatten(1, (num_heads, -1))  # [W, H, G, D]
        for head in range(num_heads):
            seen = last[:, head].transpose(0, 1).numpy()
            self.channels[layer, head] = plain_channels(seen, keys[:, head].numpy(), self._encoded.ratio)

    def _read(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        num_keys, num_values = self._encoded.counts(layer, len(keys), self._num_prompt[layer])
        keys, values = keys.clone(), values.clone()
        for head in range(keys.shape[1]):
            if num_keys:
                keys[:num_keys, head] = torch.from_numpy(self._encoded.keys(keys[:num_keys, head].numpy()))
            if num_values:
                values[:num_values, head] = torch.from_numpy(self._encoded.values(values[:num_values, head].numpy()))
            if (layer, head) in self.channels:
                gone = [c for c in range(keys.shape[2]) if c not in self.channels[layer, head]]
                keys[:num_keys, head, gone] = 0
        return keys, values
