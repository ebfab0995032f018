"""The codes of int4, entropy-coded: the same numbers come back from fewer bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.tiers.base import Buffer
from kvwise.tiers.codec import rans
from kvwise.tiers.codec.int4 import TOP, pack, unpack
from kvwise.tiers.codec.quantise import HEAD, Codes, Grid, Groups, floats, quantise, read, read_grid, restore
from kvwise.tiers.codec.sample import Sample, check_sample, check_shape
from kvwise.tiers.codec.tables import digest
from kvwise.tiers.codec.tables import pack as pack_tables
from kvwise.tiers.codec.tables import unpack as unpack_tables

NUM_CODES = TOP + 1
PACKED, ZSTD, OWN, SHARED = range(4)  # forms of the codes in a segment
_ZSTD_LEVEL = 1  # higher ones find nothing more
_ZSTD_BITS = 0.03  # bits a code that zstd may be longer by: it is five times as fast
_COUNT_BYTES = 2 * NUM_CODES

Ends = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Int4zOptions:
    """`group`: numbers that share a scale, as in int4."""

    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UsageError(f"int4z: group={self.group} must be at least 1")


class Int4z:
    """int4 (its file tells groups and error) with an entropy coder behind it.

    Each segment takes one of four forms, whatever suits it. zstd over packed codes: Huffman over pairs, fast, but its
    table costs some 100 bytes, which a layer of 8 heads x 128 hardly notices and a small one cannot pay. rANS with a
    distribution for keys and one for values that the segment brings along, in 32 bytes. rANS with those of the layer,
    `shared`, which cost nothing, if the codec was made from a sample. And codes that are merely packed, where nothing
    gains. The shortest is taken, except that zstd is preferred up to 0.03 bit a code.

    A segment is int4's with, in place of packed codes, what the form has.
    """

    name: ClassVar[str] = "int4z"
    lossless: ClassVar[bool] = False
    Options: ClassVar[type] = Int4zOptions

    def __init__(self, options: Int4zOptions | None = None, shared: Ends | None = None) -> None:
        """`shared` [layers, keys and values, 16]: slots of the codes, as `rans.ends_of` makes them."""
        self._options = options or Int4zOptions()
        self._shared = shared
        text = f"group={self._options.group}"
        if shared is not None:
            rans.check_ends(shared)
            if shared.shape[1:] != (2, NUM_CODES):
                raise ValueError(f"tables {shared.shape} are not [layers, 2, {NUM_CODES}]")
            text += f",tables={digest(self._says, {'shared': shared})}"
        self.levels: tuple[str, ...] = (f"int4z({text})",)

    @property
    def _says(self) -> str:
        return f"int4z(group={self._options.group})"

    @classmethod
    def build(cls, options: Int4zOptions, layout: KVLayout, sample: Sample | None) -> Self:
        """With shared distributions where there is a sample, else without."""
        if sample is None:
            return cls(options)
        keys, values = sample()
        check_sample("int4z", layout, keys, values)
        return cls.profile(keys, values, options)

    @classmethod
    def profile(cls, keys: Tensor, values: Tensor, options: Int4zOptions | None = None) -> Self:
        """Distributions of each layer over sample blocks: keys, values [n, L, H, block_size, D]."""
        options = options or Int4zOptions()
        groups = Groups.of(keys.shape[2:], options.group)
        counts = np.zeros((keys.shape[1], 2, NUM_CODES))
        for block_keys, block_values in zip(keys, values, strict=True):
            for layer, pair in enumerate(zip(block_keys, block_values, strict=True)):
                counts[layer] += _count(pack(quantise(floats(pair[0]), floats(pair[1]), groups, TOP).codes))
        return cls(options, rans.ends_of(counts, NUM_CODES))

    def tables(self) -> bytes | None:
        """The shared distributions, to lie beside a tier; None if there are none."""
        return None if self._shared is None else pack_tables(self._says, {"shared": self._shared})

    @classmethod
    def from_tables(cls, data: Buffer, options: Int4zOptions | None = None) -> Self:
        """What `tables` wrote. ValueError if it is not that, or was made with other options."""
        says, arrays = unpack_tables(data)
        options = options or Int4zOptions()
        if says != cls(options)._says or set(arrays) != {"shared"}:
            raise ValueError(f"tables of {says}, wanted {cls(options)._says}")
        return cls(options, arrays["shared"])

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """See `Codec.encode`. ValueError for NaN, infinity and magnitudes from 2^120 on, and for another model."""
        check_shape("int4z", None if self._shared is None else len(self._shared), keys)
        groups = Groups.of(keys.shape[1:], self._options.group)
        return [
            self._segment(quantise(floats(k), floats(v), groups, TOP), groups, layer)
            for layer, (k, v) in enumerate(zip(keys, values, strict=True))
        ]

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """See `Codec.decode`."""
        groups = Groups.of(keys.shape, self._options.group)
        start = HEAD.size + groups.grid_bytes
        form = HEAD.unpack(read(segment, "u1", HEAD.size, 0).tobytes())[2]
        rest = read(segment, "u1", max(0, memoryview(segment).nbytes - start), start).astype(np.uint8)
        codes = self._codes(form, rest, groups, layer)
        restore(read_grid(segment, groups, codes), groups, TOP, keys, values)

    def _segment(self, grid: Grid, groups: Groups, layer: int) -> Sequence[Buffer]:
        """One layer in the form that suits it."""
        packed = pack(grid.codes)
        zipped, counts = _zstd().compress(packed, asbytes=True), _count(packed)
        own = _own(counts)
        bits = {PACKED: 8.0 * len(packed), ZSTD: 8.0 * len(zipped) - _ZSTD_BITS * grid.codes.size}
        for form in (OWN,) if self._shared is None else (OWN, SHARED):
            bits[form] = rans.cost_bits(counts, self._ends(form, own, layer)) + (8 * _COUNT_BYTES if form == OWN else 0)
        form = min(bits, key=lambda form: bits[form])
        if form in (PACKED, ZSTD):
            return (grid.head(form), grid.steps(), packed if form == PACKED else zipped)
        stream = rans.encode(grid.codes, _tables(self._ends(form, own, layer), groups))
        return (grid.head(form), grid.steps(), own.tobytes() if form == OWN else b"", stream)

    def _codes(self, form: int, rest: Codes, groups: Groups, layer: int) -> Codes:
        """Codes [2, n] from what follows the scales."""
        if form == PACKED and rest.size == groups.num_codes:
            return unpack(rest)
        if form == ZSTD:
            return unpack(_unzip(rest, groups.num_codes))
        if form not in (OWN, SHARED) or (form == OWN and rest.size < _COUNT_BYTES):
            raise ValueError(f"{rest.size} bytes are no codes in form {form}")
        own, stream = (rest[:_COUNT_BYTES], rest[_COUNT_BYTES:]) if form == OWN else (rest[:0], rest)
        return rans.decode(stream.data, _tables(self._ends(form, own, layer), groups)).reshape(2, -1)

    def _ends(self, form: int, own: Codes, layer: int) -> Ends:
        if form == OWN:
            return _own_ends(own)
        if self._shared is None or layer >= len(self._shared):
            raise ValueError("a segment with shared distributions, but this codec has none for its layer")
        ends: Ends = self._shared[layer]
        return ends


def _zstd() -> Any:
    """The compressor; pyarrow is slow to import, so only who uses it pays."""
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=_ZSTD_LEVEL)


def _unzip(data: Codes, size: int) -> Codes:
    """The `size` bytes that zstd packed. ValueError if it did not; never more memory than that."""
    try:
        found = _zstd().decompress(data.tobytes(), size, asbytes=True)
    except (OSError, ValueError) as error:  # pyarrow has both
        raise ValueError(f"{data.size} bytes are no zstd frame of {size}: {error}") from error
    return np.frombuffer(found, np.uint8)


def _count(packed: bytes) -> npt.NDArray[np.int64]:
    """How often each code stands among keys and among values: [2, 16]."""
    pairs = np.bincount(np.frombuffer(packed, np.uint8), minlength=NUM_CODES**2).reshape(NUM_CODES, NUM_CODES)
    return np.stack((pairs.sum(0), pairs.sum(1)))


def _own(counts: npt.NDArray[np.int64]) -> Codes:
    """Counts [2, 16] in a byte each: relative to the most frequent code."""
    shares: Codes = np.ceil(counts * 255 / counts.max(-1, keepdims=True)).astype(np.uint8)
    return shares


def _own_ends(own: Codes) -> Ends:
    return rans.ends_of(own.reshape(2, NUM_CODES).astype(np.float64), NUM_CODES)


def _tables(ends: Ends, groups: Groups) -> rans.Tables:
    return rans.Tables(ends, (groups.num_codes, groups.num_codes), 1)
