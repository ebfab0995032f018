"""raw: a layer is written as its keys and its values lie in memory. Lossless, and nothing is copied to write it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise.tiers.base import Buffer


class Raw:
    """The `Codec` whose segments are the tensors' own bytes: a layer's keys, then its values."""

    name = "raw"
    lossless = True
    levels: tuple[str, ...] = ("raw",)

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """See `Codec.encode`; the pieces are views of the tensors."""
        layers = zip(layer_bytes(keys), layer_bytes(values), strict=True)
        return [[key_bytes, value_bytes] for key_bytes, value_bytes in layers]

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """See `Codec.decode`."""
        view = memoryview(segment).cast("B")
        if len(view) != keys.nbytes + values.nbytes:
            raise ValueError(f"a segment of {len(view)} bytes for {keys.nbytes} of keys and {values.nbytes} of values")
        (key_bytes,), (value_bytes,) = layer_bytes(keys[None]), layer_bytes(values[None])
        key_bytes[:] = view[: keys.nbytes]
        value_bytes[:] = view[keys.nbytes :]


def layer_bytes(tensor: Tensor) -> list[memoryview]:
    """The bytes of each layer of [L, H, block_size, D], as views: contiguous in the last three dimensions."""
    rows = tensor.detach().view(tensor.shape[0], -1).view(torch.uint8).numpy()
    return [memoryview(row) for row in rows]
