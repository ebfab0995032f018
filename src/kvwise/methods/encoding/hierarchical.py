"""Hierarchical codes: one copy of the KV that is read in eight bits, or in its upper four."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Trait
from kvwise.kernels.packed import Codes, PageFormat
from kvwise.methods.encoding.base import EncodingShape
from kvwise.methods.encoding.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hierarchical(Packing):
    """QuantSpec's KV, arXiv 2502.10424 section 4.

    A number is an upper code of 4 bits and a lower one of 4 more, in sixteenths of the upper one's step: the target
    model reads both, a draft may read the upper ones alone, and there is one copy of either. Keys share steps per
    channel over `group` tokens, values per token over `group` channels.

    The newest `group` to 2 `group` - 1 tokens stay in full precision: two buffers of `group` tokens, and when both are
    full the older one is sealed. So the newest `group` tokens can be taken back without touching a code.
    `reader=4` makes a model answer with what the draft would read.
    """

    group: int = 128
    reader: int = 8

    name: ClassVar[str] = "hierarchical"
    idea: ClassVar[str] = "store KV as 4 upper and 4 lower bits, one copy for a draft and a target, new tokens in full"
    paper: ClassVar[str] = "QuantSpec, arXiv 2502.10424"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.PACKS})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("group", self.group >= 1, "at least 1")
        self.require("reader", self.reader in (4, 8), "8 (the target's) or 4 (the draft's)")

    @property
    def upper_only(self) -> bool:
        """As the draft reads."""
        return self.reader == 4

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """A buffer to a page."""
        keys = Codes(8, "channel", self.group, split=True)
        return PageFormat(keys, Codes(8, "token", self.group, split=True), self.group, shape.head_dim)

    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return (num_open // self.group - 1).clamp(min=0) * self.group
