"""What CacheGen codes: numbers to codes and back, as the paper has it and as the released code has it.

| | paper (arXiv 2310.07240, section 5.2) | released (UChi-JCL/CacheGen, `serde/cachegen_{basics,encoder}.py`) |
|---|---|---|
| a token is coded as | the first of every 10: itself; the others: their distance to it | itself |
| bins | 8 bits for the first; distances: fewer in later layers | K 32 (layers 0-9 of 32) or 16, V 32 (0, 1) or 16 |
| levels | several | one (here the later ones have 3/4, 1/2 and 3/8 of its bins) |

A code is round(x * m / scale) + m with m = bins // 2 - 1 and the scale of a token the largest magnitude over all its
channels in the layer. How many bins a distance has is not said for models in general: `_PAPER_BINS` are ours, halved
from one level to the next. The distance is to the anchor as it will be read back, so errors do not add up. An anchor's
upper four bits are range-coded, its lower four, which hardly differ in frequency, are kept as they are: distributions
over 256 codes would need far larger samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvwise.tiers.base import Buffer
from kvwise.tiers.codec.quantise import HEAD, Floats, Halves, half_above, power, read, scaled, store

Small = npt.NDArray[np.uint8]
Shape = Sequence[int]  # of a layer: H, block_size, D

GROUP = 10
_ANCHOR_STEPS = 127  # 8 bits, symmetric
_PAPER_BINS = ((64, 48, 32), (32, 24, 16), (16, 12, 8), (12, 8, 6))  # for each level, by thirds of the layers
_RELEASED_BINS = ((32, 16), (24, 12), (16, 8), (12, 6))  # for each level: early layers, late layers


@dataclass(frozen=True, slots=True)
class Codes:
    """One layer: powers of two, float16 scales [K and V, block_size], codes of each kind [K and V, H, rows, D].

    `low`: what is kept as it is, [K and V, H, rows, D] below 16.
    """

    exponents: tuple[int, int]
    scales: Halves
    kinds: tuple[Small, ...]
    low: Small | None = None

    def flat(self) -> Small:
        """All codes that are to be range-coded, kind after kind."""
        return np.concatenate([codes.reshape(-1) for codes in self.kinds])

    def count(self, counts: npt.NDArray[np.float64]) -> None:
        """Add how often each channel shows each code to counts [kinds, K and V, H, D, codes]."""
        for codes, seen in zip(self.kinds, counts, strict=True):
            num_parts, num_heads, _, head_dim = codes.shape
            part, head, dim = (np.arange(n) for n in (num_parts, num_heads, head_dim))
            np.add.at(seen, (part[:, None, None, None], head[:, None, None], dim, codes), 1)


class Mode(Protocol):
    """One way to make codes."""

    num_kinds: int  # kinds of codes with distributions of their own

    def num_codes(self, level: int) -> int:
        """Codes are below this."""
        ...

    def rows(self, block_size: int) -> tuple[int, ...]:
        """Tokens of a block that have a code of each kind."""
        ...

    def quantise(self, keys: Floats, values: Floats, level: int, layer: int, num_layers: int) -> Codes:
        """Codes of one layer [H, block_size, D]. ValueError as in `quantise.scaled`."""
        ...

    def restore(self, codes: Codes, level: int, layer: int, num_layers: int, keys: Tensor, values: Tensor) -> None:
        """Write them back. ValueError for scales that `quantise` cannot have made."""
        ...


class Released:
    """Each token by itself."""

    num_kinds = 1

    def num_codes(self, level: int) -> int:
        """See `Mode.num_codes`."""
        return _RELEASED_BINS[level][0] - 1

    def rows(self, block_size: int) -> tuple[int, ...]:
        """See `Mode.rows`."""
        return (block_size,)

    def quantise(self, keys: Floats, values: Floats, level: int, layer: int, num_layers: int) -> Codes:
        """See `Mode.quantise`."""
        exponents, found = [], []
        for numbers, steps in zip((keys, values), self._steps(level, layer, num_layers), strict=True):
            numbers, exponent = scaled(numbers)
            exponents.append(exponent)
            found.append(_quantise(numbers, steps))
        codes, scales = (np.stack(arrays) for arrays in zip(*found, strict=True))
        return Codes((exponents[0], exponents[1]), scales, (codes,))

    def restore(self, codes: Codes, level: int, layer: int, num_layers: int, keys: Tensor, values: Tensor) -> None:
        """See `Mode.restore`."""
        for part, (out, steps) in enumerate(zip((keys, values), self._steps(level, layer, num_layers), strict=True)):
            scales = _scales(codes, part)
            store(_restore(codes.kinds[0][part], scales, steps), out)

    def _steps(self, level: int, layer: int, num_layers: int) -> tuple[int, int]:
        """m of keys and of values; the published cuts are those of 32 layers."""
        early, late = _RELEASED_BINS[level]
        keys = early if layer < round(num_layers * 10 / 32) else late
        values = early if layer < 2 else late
        return keys // 2 - 1, values // 2 - 1


class Paper:
    """Anchors, and distances to them. Kinds: distances, upper halves of anchors."""

    num_kinds = 2

    def num_codes(self, level: int) -> int:
        """See `Mode.num_codes`."""
        return max(16, _PAPER_BINS[level][0] - 1)

    def rows(self, block_size: int) -> tuple[int, ...]:
        """See `Mode.rows`."""
        num_anchors = -(-block_size // GROUP)
        return (block_size - num_anchors, num_anchors)

    def quantise(self, keys: Floats, values: Floats, level: int, layer: int, num_layers: int) -> Codes:
        """See `Mode.quantise`."""
        steps = self._steps(level, layer, num_layers)
        first, rest = _split(keys.shape[1])
        exponents, scales = [], np.empty((2, keys.shape[1]), np.float16)
        anchors, distances = [], []
        for part, numbers in enumerate((keys, values)):
            numbers, exponent = scaled(numbers)
            exponents.append(exponent)
            codes, scales[part, first] = _quantise(numbers[:, first], _ANCHOR_STEPS)
            anchors.append(codes)
            known = _restore(codes, scales[part, first].astype(np.float32), _ANCHOR_STEPS)
            codes, scales[part, rest] = _quantise(numbers[:, rest] - known[:, rest // GROUP], steps)
            distances.append(codes)
        both = np.stack(anchors)
        kinds = (np.stack(distances), both >> np.uint8(4))
        return Codes((exponents[0], exponents[1]), scales, kinds, both & np.uint8(15))

    def restore(self, codes: Codes, level: int, layer: int, num_layers: int, keys: Tensor, values: Tensor) -> None:
        """See `Mode.restore`."""
        steps = self._steps(level, layer, num_layers)
        first, rest = _split(keys.shape[1])
        distances, upper = codes.kinds
        if codes.low is None or upper.max(initial=0) > 15:
            raise ValueError("an anchor's code is above 255")
        anchors = codes.low | upper << np.uint8(4)
        for part, out in enumerate((keys, values)):
            scales = _scales(codes, part)
            numbers = np.empty(out.shape, np.float32)
            known = _restore(anchors[part], scales[first], _ANCHOR_STEPS)
            numbers[:, first] = known
            numbers[:, rest] = _restore(distances[part], scales[rest], steps) + known[:, rest // GROUP]
            store(numbers, out)

    def _steps(self, level: int, layer: int, num_layers: int) -> int:
        """m of distances."""
        return _PAPER_BINS[level][3 * layer // num_layers] // 2 - 1


MODES: Mapping[str, Mode] = MappingProxyType({"paper": Paper(), "released": Released()})


def head(codes: Codes) -> bytes:
    """What stands before the stream in a segment."""
    low = b"" if codes.low is None else (codes.low[0] | codes.low[1] << np.uint8(4)).tobytes()
    return HEAD.pack(*codes.exponents, 0) + codes.scales.tobytes() + low


def open_head(mode: Mode, segment: Buffer, shape: Shape) -> tuple[Codes, memoryview]:
    """(Codes of a segment without its kinds, its stream). ValueError if it is shorter than its head."""
    num_heads, block_size, head_dim = shape
    first, second, _ = HEAD.unpack(read(segment, "u1", HEAD.size, 0).tobytes())
    scales = read(segment, "<f2", 2 * block_size, HEAD.size).astype(np.float16).reshape(2, block_size)
    start, low = HEAD.size + 4 * block_size, None
    if mode.num_kinds == 2:
        size = mode.rows(block_size)[1] * num_heads * head_dim
        packed = read(segment, "u1", size, start).astype(np.uint8).reshape(num_heads, -1, head_dim)
        low, start = np.stack((packed & np.uint8(15), packed >> np.uint8(4))), start + size
    return Codes((first, second), scales, (), low), memoryview(segment).cast("B")[start:]


def _split(block_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens that are anchors, and the others."""
    tokens = np.arange(block_size)
    return tokens[::GROUP], tokens[tokens % GROUP > 0]


def _quantise(numbers: Floats, steps: int) -> tuple[Small, Halves]:
    """Codes 0..2 * steps of [H, rows, D], and a scale for each row."""
    scales = half_above(np.abs(numbers).max((0, 2), initial=0))
    factors = np.float32(steps) / np.where(scales > 0, scales, 1).astype(np.float32)
    codes = np.rint(numbers * factors[:, None]) + np.float32(steps)
    return codes.astype(np.uint8), scales


def _restore(codes: Small, scales: Floats, steps: int) -> Floats:
    """The numbers of [H, rows, D] codes."""
    numbers: Floats = codes.astype(np.float32)
    numbers -= np.float32(steps)
    numbers *= (scales / np.float32(steps))[:, None]
    return numbers


def _scales(codes: Codes, part: int) -> Floats:
    """Scales [block_size] of keys (0) or values (1), their power of two included."""
    halves = codes.scales[part]
    if not (np.isfinite(halves).all() and halves.min(initial=0) >= 0):
        raise ValueError("a scale is negative or no number")
    scales: Floats = halves.astype(np.float32) * power(codes.exponents[part])
    return scales
