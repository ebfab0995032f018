"""What `int8` and `int4` have in common: integer codes, keys per channel and values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvwise.kernels.packed import Codes, PageFormat, Plain
from kvwise.methods.encoding.base import EncodingShape
from kvwise.methods.encoding.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

NATIVE_BITS = 16  # stands for the pool's own dtype, whatever it is


@dataclass(frozen=True)
class Integers(Packing):
    """Integer codes with a step and a zero per group, sealed as soon as there are `group` tokens."""

    key_bits: int = 8
    value_bits: int = 8
    group: int = 64
    value_group: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("key_bits", "value_bits"):
            bits = getattr(self, option)
            self.require(option, 1 <= bits <= 8 or bits == NATIVE_BITS, "1 to 8, or 16 for the pool's dtype")
        self.require("group", self.group >= 1, "at least 1 token")
        self.require("value_group", self.value_group >= 1, "at least 1 channel")

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """A group of tokens to a page."""
        return PageFormat(
            self._part(self.key_bits, "channel", self.group, shape),
            self._part(self.value_bits, "token", self.value_group, shape),
            self.group,
            shape.head_dim,
        )

    def _part(self, bits: int, axis: Literal["channel", "token"], group: int, shape: EncodingShape) -> Codes | Plain:
        return Plain(shape.dtype, shape.head_dim) if bits == NATIVE_BITS else Codes(bits, axis, group)

    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return num_open // self.group * self.group
