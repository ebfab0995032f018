"""Numbers to small whole codes and back, one layer of a block at a time: what the lossy codecs share.

Scales and zeros are kept as float16. So that no outlier leaves its range, the keys and the values of a layer are first
divided by a power of two each (exact), which is kept beside them. What a scale or zero loses by rounding is rounded
outwards, so the codes always reach both ends of their group and the error is at most half a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import frexp, prod
from struct import Struct
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvwise.tiers.base import Buffer

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Codes = npt.NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)

HEAD = Struct("<bbBx")  # powers of two of keys and values, and how the rest is written
_TOP = 14  # the largest magnitude lies below 2^14 once divided, so that a difference is a float16 too
_EXPONENTS = range(-100, 107)
_LARGEST = 2.0**120
_HALF_MAX = float(np.finfo(np.float16).max)


def floats(tensor: Tensor) -> Floats:
    """The same numbers as float32; a view where they are that already."""
    array: Floats = tensor.float().numpy()
    return array


def store(numbers: Floats, tensor: Tensor) -> None:
    """Write numbers into a tensor of the same shape; what rounding pushed beyond float16 stays at its limit."""
    if tensor.dtype == torch.float16:
        numbers = numbers.clip(-_HALF_MAX, _HALF_MAX)
    tensor.copy_(torch.from_numpy(numbers))


def scaled(numbers: Floats) -> tuple[Floats, int]:
    """(numbers / 2^e, e) with magnitudes below 2^14. ValueError for NaN, infinity and magnitudes from 2^120 on."""
    largest = max(float(numbers.max(initial=0)), -float(numbers.min(initial=0)))
    if not largest < _LARGEST:
        raise ValueError(f"numbers up to {largest} cannot be quantised: NaN, infinite or beyond 2^120")
    exponent = min(max(frexp(largest)[1] - _TOP, _EXPONENTS[0]), _EXPONENTS[-1]) if largest else 0
    return numbers * np.float32(2.0**-exponent), exponent


def power(exponent: int) -> np.float32:
    """2^exponent. ValueError for one that `scaled` cannot have chosen."""
    if exponent not in _EXPONENTS:
        raise ValueError(f"no layer is scaled by 2^{exponent}")
    return np.float32(2.0**exponent)


def half_above(numbers: Floats) -> Halves:
    """The least float16 that is not below each number."""
    halves = numbers.astype(np.float16)
    return np.where(halves < numbers, np.nextafter(halves, np.float16(np.inf)), halves)


def half_below(numbers: Floats) -> Halves:
    """The greatest float16 that is not above each number."""
    return -half_above(-numbers)


def read(segment: Buffer, dtype: str, count: int, offset: int) -> npt.NDArray[np.generic]:
    """`count` numbers of a segment from byte `offset` on. ValueError if it is shorter."""
    dtype_bytes = np.dtype(dtype).itemsize
    if offset + count * dtype_bytes > memoryview(segment).nbytes:
        raise ValueError(f"a segment of {memoryview(segment).nbytes} bytes has no {count} numbers from {offset} on")
    return np.frombuffer(segment, dtype, count, offset)


@dataclass(frozen=True)
class Groups:
    """How a layer [H, block_size, D] is cut into groups that share a scale and a zero, KIVI's layout (2402.02750).

    Keys: `group` tokens of one channel, as their outliers stay in channels. Values: `group` channels of one token.
    A block holds whole groups only: the last ones are shorter where block_size or D is no multiple.
    """

    num_heads: int
    block_size: int
    head_dim: int
    group: int

    @classmethod
    def of(cls, shape: Sequence[int], group: int) -> Self:
        """Those of a layer of this shape [H, block_size, D]."""
        num_heads, block_size, head_dim = shape
        return cls(num_heads, block_size, head_dim, group)

    @property
    def num_codes(self) -> int:
        """Codes of the keys, and as many of the values."""
        return self.num_heads * self.block_size * self.head_dim

    @cached_property
    def key_shape(self) -> tuple[int, int, int, int]:
        """Scales of keys [H, groups of tokens, 1, D]."""
        return (self.num_heads, -(-self.block_size // self.group), 1, self.head_dim)

    @cached_property
    def value_shape(self) -> tuple[int, int, int, int]:
        """Scales of values [H, block_size, groups of channels, 1]."""
        return (self.num_heads, self.block_size, -(-self.head_dim // self.group), 1)

    @cached_property
    def num_groups(self) -> int:
        """Groups of keys and values."""
        return prod(self.key_shape) + prod(self.value_shape)

    @property
    def grid_bytes(self) -> int:
        """Bytes of all scales and zeros."""
        return 4 * self.num_groups

    def split(self, numbers: npt.NDArray[Number], axis: int) -> npt.NDArray[Number]:
        """[H, block_size, D] with axis 1 or 2 cut into groups; a short last group is filled up with its last entry."""
        size = numbers.shape[axis]
        group = min(self.group, size)
        if size % group:
            padding = [(0, 0)] * 3
            padding[axis] = (0, -size % group)
            numbers = np.pad(numbers, padding, mode="edge")
        shape = numbers.shape
        return numbers.reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])

    def join(self, numbers: npt.NDArray[Number], axis: int) -> npt.NDArray[Number]:
        """What `split` cut."""
        size = (self.block_size, self.head_dim)[axis - 1]
        joined = numbers.reshape(*numbers.shape[:axis], -1, *numbers.shape[axis + 2 :])
        return joined[:, :size] if axis == 1 else joined[:, :, :size]


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantised keys and values of a layer: codes [2, H * block_size * D], float16 scales and zeros, powers of two."""

    codes: Codes
    scales: Halves  # [groups of keys, then of values]
    zeros: Halves
    exponents: tuple[int, int]

    def head(self, form: int = 0) -> bytes:
        """The first bytes of a segment."""
        return HEAD.pack(*self.exponents, form)

    def steps(self) -> bytes:
        """Scales and zeros."""
        return self.scales.tobytes() + self.zeros.tobytes()


def read_grid(segment: Buffer, groups: Groups, codes: Codes) -> Grid:
    """A segment's head, scales and zeros, with codes found elsewhere. ValueError if it is shorter."""
    first, second, _ = HEAD.unpack(read(segment, "u1", HEAD.size, 0).tobytes())
    steps = read(segment, "<f2", 2 * groups.num_groups, HEAD.size).astype(np.float16)
    return Grid(codes, steps[: groups.num_groups], steps[groups.num_groups :], (first, second))


def quantise(keys: Floats, values: Floats, groups: Groups, top: int) -> Grid:
    """Codes 0..top of one layer [H, block_size, D]; x is about zero + code * scale. ValueError as in `scaled`."""
    codes = np.empty((2, groups.num_codes), np.uint8)
    scales, zeros, exponents = [], [], []
    for part, (numbers, axis) in enumerate(((keys, 1), (values, 2))):
        numbers, exponent = scaled(numbers)
        found, scale, zero = _quantise(groups.split(numbers, axis), axis + 1, top)
        codes[part] = groups.join(found, axis).reshape(-1)
        scales.append(scale.reshape(-1))
        zeros.append(zero.reshape(-1))
        exponents.append(exponent)
    return Grid(codes, np.concatenate(scales), np.concatenate(zeros), (exponents[0], exponents[1]))


def restore(grid: Grid, groups: Groups, top: int, keys: Tensor, values: Tensor) -> None:
    """Write what `quantise` kept into keys, values [H, block_size, D]. ValueError for scales it cannot have made."""
    num_keys = prod(groups.key_shape)
    parts = (
        (0, 1, groups.key_shape, slice(None, num_keys), keys),
        (1, 2, groups.value_shape, slice(num_keys, None), values),
    )
    for part, axis, shape, own, out in parts:
        unit, scales, zeros = power(grid.exponents[part]), grid.scales[own], grid.zeros[own]
        if not (np.isfinite(scales).all() and np.isfinite(zeros).all() and scales.min(initial=0) >= 0):
            raise ValueError("a scale is negative or no number")
        scale, zero = (halves.astype(np.float32).reshape(shape) for halves in (scales, zeros))
        if max(-zero.min(initial=0), (zero + scale * top).max(initial=0)) > 2 << _TOP:
            raise ValueError(f"a group reaches beyond 2^{_TOP + 1} before it is scaled")
        scale, zero = scale * unit, zero * unit
        numbers = groups.split(grid.codes[part].reshape(out.shape), axis).astype(np.float32)
        numbers *= scale
        numbers += zero
        store(groups.join(numbers, axis), out)


def _quantise(numbers: Floats, axis: int, top: int) -> tuple[Codes, Halves, Halves]:
    """Codes, and scales and zeros with `axis` kept as 1."""
    zeros = half_below(numbers.min(axis, keepdims=True))
    base = zeros.astype(np.float32)
    scales = half_above((numbers.max(axis, keepdims=True) - base) / np.float32(top))
    steps = scales.astype(np.float32)
    steps[steps == 0] = 1  # all the same: code 0
    shares = numbers - base
    shares /= steps
    return np.rint(shares, out=shares).astype(np.uint8), scales, zeros
