"""Four bits a number, in groups with a float16 scale and zero each; two codes a byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer
from kvwise.tiers.codec.quantise import HEAD, Codes, Groups, floats, quantise, read, read_grid, restore

TOP = 15


@dataclass(frozen=True)
class Int4:
    """Asymmetric groups, KIVI's layout (arXiv 2402.02750, section 3): keys per channel, values per token.

    A group of keys ends with its block, so with 16-token blocks `group` is 16 for keys. A segment is two powers of two,
    the scales and zeros (keys, then values) and the codes: byte i holds that of key i (low bits) and of value i. What
    comes back is at most half a step of its group away, and what rounding to the model's dtype adds.
    """

    name: ClassVar[str] = "int4"
    lossless: ClassVar[bool] = False
    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UsageError(f"int4: group={self.group} must be at least 1")

    @property
    def levels(self) -> tuple[str, ...]:
        """One quality."""
        return (f"int4(group={self.group})",)

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """See `Codec.encode`. ValueError for NaN, infinity and magnitudes from 2^120 on."""
        groups = Groups.of(keys.shape[1:], self.group)
        grids = (quantise(floats(k), floats(v), groups, TOP) for k, v in zip(keys, values, strict=True))
        return [(grid.head(), grid.steps(), pack(grid.codes)) for grid in grids]

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """See `Codec.decode`."""
        groups = Groups.of(keys.shape, self.group)
        start = HEAD.size + groups.grid_bytes
        size = start + groups.num_codes
        if memoryview(segment).nbytes != size:
            raise ValueError(f"a layer takes {size} bytes as {self.levels[0]}, got {memoryview(segment).nbytes}")
        codes = unpack(read(segment, "u1", groups.num_codes, start).astype(np.uint8))
        restore(read_grid(segment, groups, codes), groups, TOP, keys, values)


def pack(codes: Codes) -> bytes:
    """Codes [2, n] below 16 as n bytes: of the first row in the low bits, of the second in the high ones."""
    packed: bytes = (codes[0] | codes[1] << np.uint8(4)).tobytes()
    return packed


def unpack(packed: Codes) -> Codes:
    """Codes [2, n] that `pack` put into n bytes."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)))
