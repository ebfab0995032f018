"""Eight bits a number, in groups with a float16 scale and zero each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer
from kvwise.tiers.codec.quantise import HEAD, Groups, floats, quantise, read, read_grid, restore

_TOP = 255


@dataclass(frozen=True)
class Int8:
    """Asymmetric groups, KIVI's layout (arXiv 2402.02750, section 3): keys per channel, values per token.

    A segment is two powers of two, the scales and zeros (keys, then values) and a byte for each number. What comes back
    is at most half a step of its group away, and what rounding to the model's dtype adds.
    """

    name: ClassVar[str] = "int8"
    lossless: ClassVar[bool] = False
    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UsageError(f"int8: group={self.group} must be at least 1")

    @property
    def levels(self) -> tuple[str, ...]:
        """One quality."""
        return (f"int8(group={self.group})",)

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """See `Codec.encode`. ValueError for NaN, infinity and magnitudes from 2^120 on."""
        groups = Groups.of(keys.shape[1:], self.group)
        grids = (quantise(floats(k), floats(v), groups, _TOP) for k, v in zip(keys, values, strict=True))
        return [(grid.head(), grid.steps(), grid.codes.tobytes()) for grid in grids]

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """See `Codec.decode`."""
        groups = Groups.of(keys.shape, self.group)
        start = HEAD.size + groups.grid_bytes
        size = start + 2 * groups.num_codes
        if memoryview(segment).nbytes != size:
            raise ValueError(f"a layer takes {size} bytes as {self.levels[0]}, got {memoryview(segment).nbytes}")
        codes = read(segment, "u1", 2 * groups.num_codes, start).astype(np.uint8).reshape(2, -1)
        restore(read_grid(segment, groups, codes), groups, _TOP, keys, values)
