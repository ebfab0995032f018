"""CacheGen: coarse codes, finer in the earlier layers, range-coded with what each channel is like."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.tiers.base import Buffer
from kvwise.tiers.codec import rans
from kvwise.tiers.codec.cachegen_codes import MODES, head, open_head
from kvwise.tiers.codec.quantise import floats
from kvwise.tiers.codec.sample import Sample, check_sample, check_shape
from kvwise.tiers.codec.tables import digest
from kvwise.tiers.codec.tables import pack as pack_tables
from kvwise.tiers.codec.tables import unpack as unpack_tables

MAX_LEVELS = 4
_LAYER_WEIGHT = 8.0  # a channel's distribution starts from that of its layer, as if seen for so many tokens

Ends = npt.NDArray[np.int16]


@dataclass(frozen=True)
class CacheGenOptions:
    """`levels`: qualities to choose from, best first. `mode`: `paper` or `released`."""

    levels: int = 3
    mode: str = "paper"

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MAX_LEVELS:
            raise UsageError(f"cachegen: levels={self.levels} must be 1 to {MAX_LEVELS}")
        if self.mode not in MODES:
            raise UsageError(f"cachegen: mode={self.mode!r} must be one of {', '.join(MODES)}")


class CacheGenCodec:
    """Codes of `cachegen_codes.py`, where paper and released code differ, behind a range coder (rANS).

    arXiv 2310.07240, section 5.2. Each layer, channel and kind of code has a distribution of its own, profiled
    beforehand over sample blocks; one that a channel has never shown still has a slot. Departures from both sources:
    rANS for their arithmetic coder (same sizes, decodes faster); groups and streams end with a block, so that any block
    is read alone; the released code makes its distributions from the chunk at hand and sends them along, which 16
    tokens cannot pay for.

    A segment is two powers of two, a float16 scale for each token of keys and of values, in paper mode the low halves
    of the anchors' codes, and the stream.
    """

    name: ClassVar[str] = "cachegen"
    lossless: ClassVar[bool] = False
    Options: ClassVar[type] = CacheGenOptions

    def __init__(self, options: CacheGenOptions, ends: Sequence[Ends]) -> None:
        """`ends`: for each level [L, kinds, K and V, H, D, width], as `rans.ends_of` makes them; they are checked."""
        mode = MODES[options.mode]
        for level, table in enumerate(ends):
            rans.check_ends(table)
            wanted = (mode.num_kinds, 2, rans.width_for(mode.num_codes(level)))
            if table.ndim != 6 or (table.shape[1], table.shape[2], table.shape[5]) != wanted:
                raise ValueError(
                    f"tables {table.shape} of level {level} are not [L, {wanted[0]}, 2, H, D, {wanted[2]}]"
                )
        if len(ends) != options.levels or len({table.shape[:5] for table in ends}) != 1:
            raise ValueError(f"tables of {len(ends)} levels, wanted {options.levels} of one shape")
        self._options, self._mode, self._ends = options, mode, list(ends)
        mark = digest(self._says, self._arrays())
        text = f"mode={options.mode},tables={mark}"
        self.levels: tuple[str, ...] = tuple(f"cachegen(level={level},{text})" for level in range(options.levels))

    @property
    def _says(self) -> str:
        return f"cachegen(levels={self._options.levels},mode={self._options.mode})"

    def _arrays(self) -> dict[str, Ends]:
        return {f"level{level}": table for level, table in enumerate(self._ends)}

    @classmethod
    def build(cls, options: CacheGenOptions, layout: KVLayout, sample: Sample | None) -> Self:
        """Profiled over the sample; UsageError without one."""
        if sample is None:
            raise UsageError("cachegen needs sample blocks to profile its distributions: give a sample, or its tables")
        keys, values = sample()
        check_sample("cachegen", layout, keys, values)
        return cls.profile(keys, values, options)

    @classmethod
    def profile(cls, keys: Tensor, values: Tensor, options: CacheGenOptions | None = None) -> Self:
        """Distributions over sample blocks: keys, values [n, L, H, block_size, D]."""
        options = options or CacheGenOptions()
        mode, num_layers = MODES[options.mode], keys.shape[1]
        shape = (num_layers, mode.num_kinds, 2, keys.shape[2], keys.shape[4])
        counts = [np.zeros((*shape, mode.num_codes(level))) for level in range(options.levels)]
        for block_keys, block_values in zip(keys, values, strict=True):
            for layer, (k, v) in enumerate(zip(block_keys, block_values, strict=True)):
                for level, seen in enumerate(counts):
                    mode.quantise(floats(k), floats(v), level, layer, num_layers).count(seen[layer])
        return cls(options, [_distributions(seen) for seen in counts])

    def tables(self) -> bytes:
        """The distributions, to lie beside a tier."""
        return pack_tables(self._says, self._arrays())

    @classmethod
    def from_tables(cls, data: Buffer, options: CacheGenOptions | None = None) -> Self:
        """What `tables` wrote. ValueError if it is not that, or was made with other options."""
        options = options or CacheGenOptions()
        says, arrays = unpack_tables(data)
        names = [f"level{level}" for level in range(options.levels)]
        if says != f"cachegen(levels={options.levels},mode={options.mode})" or set(arrays) != set(names):
            raise ValueError(f"tables of {says}, wanted levels={options.levels}, mode={options.mode}")
        return cls(options, [arrays[name] for name in names])

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """See `Codec.encode`. ValueError for NaN, infinity and magnitudes from 2^120 on, and for another model."""
        num_layers = len(self._ends[level])
        check_shape("cachegen", num_layers, keys)
        segments: list[Sequence[Buffer]] = []
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            codes = self._mode.quantise(floats(k), floats(v), level, layer, num_layers)
            segments.append((head(codes), rans.encode(codes.flat(), self._tables(level, layer, k))))
        return segments

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """See `Codec.decode`."""
        num_layers = len(self._ends[level])
        if layer >= num_layers:
            raise ValueError(f"cachegen: layer {layer} of {num_layers}")
        codes, stream = open_head(self._mode, segment, keys.shape)
        flat, kinds = rans.decode(stream, self._tables(level, layer, keys)), []
        num_heads, block_size, head_dim = keys.shape
        for rows in self._mode.rows(block_size):
            size = 2 * num_heads * rows * head_dim
            kinds.append(flat[:size].reshape(2, num_heads, rows, head_dim))
            flat = flat[size:]
        self._mode.restore(replace(codes, kinds=tuple(kinds)), level, layer, num_layers, keys, values)

    def _tables(self, level: int, layer: int, tensor: Tensor) -> rans.Tables:
        """Each (kind, keys or values, head) is a part with a row for each token that has such a code."""
        table = self._ends[level][layer]
        num_heads, block_size, head_dim = tensor.shape
        if (num_heads, head_dim) != table.shape[2:4]:
            raise ValueError(f"cachegen: {tuple(tensor.shape)} for tables of {table.shape[2]} heads x {table.shape[3]}")
        rows = [count for count in self._mode.rows(block_size) for _ in range(2 * num_heads)]
        return rans.Tables(table.reshape(-1, table.shape[-1]), tuple(rows), head_dim)


def _distributions(counts: npt.NDArray[np.float64]) -> Ends:
    """Counts [L, kinds, K and V, H, D, codes] as ends, each channel's smoothed by those of its layer."""
    layer = counts.sum((3, 4), keepdims=True) + 1 / counts.shape[-1]
    prior = _LAYER_WEIGHT * layer / layer.sum(-1, keepdims=True)
    return rans.ends_of(counts + prior, rans.width_for(counts.shape[-1]))
