"""KIVI: two-bit keys per channel and values per token, behind a residual in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Trait
from kvwise.kernels.packed import Codes, PageFormat
from kvwise.methods.encoding.base import EncodingShape
from kvwise.methods.encoding.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_PAGE = 128  # tokens: longer pages would gain nothing and leave more of a block unused


@dataclass(frozen=True)
class KIVI(Packing):
    """KIVI, arXiv 2402.02750 section 3.

    Keys in `group` consecutive tokens of a channel, values in `group` channels of a token, share a step and a zero
    (float16). Keys gather until `residual` of them are open, and are sealed all at once; of values the newest
    `residual` stay open, and older ones are sealed token by token: the two end at different tokens. A prompt attends
    to itself in full precision and is sealed when its prefill has ended, all but the last T mod `residual` keys and
    the last `residual` values.

    `residual` is a multiple of `group`, as in the released code, of which this is the rule to the token. Zero and step
    are rounded to float16 before the codes are made, so that codes fit what they are read with.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    name: ClassVar[str] = "kivi"
    idea: ClassVar[str] = "store KV in 2 bits, keys per channel and values per token, the newest tokens in full"
    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.PACKS})
    page_granular: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("bits", 1 <= self.bits <= 8, "1 to 8")
        self.require("group", self.group >= 1, "at least 1")
        fits = self.residual >= 1 and self.residual % self.group == 0
        self.require("residual", fits, f"a multiple of group={self.group}")

    @property
    def page_tokens(self) -> int:
        """Tokens of a page: as many whole groups as divide the residual and do not exceed 128 tokens."""
        fitting = [t for t in range(self.group, self.residual + 1, self.group) if self.residual % t == 0]
        return max((t for t in fitting if t <= LONGEST_PAGE), default=self.group)

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """Keys per channel, values per token."""
        keys, values = Codes(self.bits, "channel", self.group), Codes(self.bits, "token", self.group)
        return PageFormat(keys, values, self.page_tokens, shape.head_dim)

    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return num_open // self.residual * self.residual

    def _values_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return (num_open - self.residual).clamp(min=0)
