"""fp8: sealed tokens as eight-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Trait
from kvwise.kernels.packed import Float8, PageFormat
from kvwise.methods.encoding.base import EncodingShape
from kvwise.methods.encoding.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FP8(Packing):
    """Every `group` tokens of a head as e4m3 floats (4 bits of exponent, 3 of mantissa; arXiv 2209.05433).

    One scale for the keys of these tokens and one for their values brings the largest magnitude to 448, the largest
    number there is. Tokens are sealed as soon as there is a whole group of them.
    """

    group: int = 64

    name: ClassVar[str] = "fp8"
    idea: ClassVar[str] = "store KV as 8-bit floats (e4m3), with one scale per head and group of tokens"
    paper: ClassVar[str] = "FP8 Formats for Deep Learning, arXiv 2209.05433"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.PACKS})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("group", self.group >= 1, "at least 1 token")

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """A group to a page."""
        return PageFormat(Float8(), Float8(), self.group, shape.head_dim)

    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return num_open // self.group * self.group
