"""ThinK: the key channels that the queries hardly use are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.kernels.packed import PageFormat, Plain
from kvwise.methods.encoding.base import ChannelView, EncodingShape
from kvwise.methods.encoding.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ThinK(Packing):
    """ThinK, arXiv 2407.21018 section 4, per layer and KV head.

    A channel is worth the mean square of the prompt's last `observed` queries in it times the mean square of the
    prompt's keys: but for a constant the squared Frobenius norm of their outer product, which the paper ranks by (the
    released code computes it this way). Of D channels the int(`ratio` * D) least worth ones are removed, of equals the
    later ones. Queries that share a KV head are averaged; the released code repeats the head for each of them, and
    chooses for each.

    The prompt's last `recent` keys keep all channels, and so do all keys that are generated. Values keep all theirs.
    Scores are still divided by the square root of D. A request that is preempted is computed again with its output,
    and then only the last `recent` keys of both keep all channels.
    """

    ratio: float = 0.4
    recent: int = 32
    observed: int = 32

    name: ClassVar[str] = "think"
    idea: ClassVar[str] = "remove the key channels that the end of the prompt hardly uses, but not of the newest keys"
    paper: ClassVar[str] = "ThinK, arXiv 2407.21018"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_LAST_ROWS, Trait.PACKS, Trait.PRUNES_CHANNELS})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("ratio", 0 <= self.ratio < 1, "at least 0, below 1")
        self.require("recent", self.recent >= 0, "at least 0")
        self.require("observed", self.observed >= 1, "at least 1")

    @property
    def observed_rows(self) -> int:
        """`observed`."""
        return self.observed

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """Keys of fewer channels in the pool's dtype; nothing is packed if no channel goes."""
        kept = self._num_kept(shape.head_dim)
        if kept == shape.head_dim:
            return None
        return PageFormat(
            Plain(shape.dtype, kept), Plain(shape.dtype, shape.head_dim), shape.block_size, shape.head_dim
        )

    def channels(self, view: ChannelView) -> Tensor | None:
        """The best ones."""
        return torch.stack([self._channels(view.queries(layer), view.keys(layer)) for layer in range(view.shape[0])])

    def _channels(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of one layer: int64 [H, kept]."""
        worth = queries.square().mean((1, 2)) * keys.square().mean(1)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        return order[:, : self._num_kept(keys.shape[-1])].sort().values

    def _num_kept(self, head_dim: int) -> int:
        return head_dim - int(head_dim * self.ratio)

    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        return (num_open - self.recent).clamp(min=0) if settling else torch.zeros_like(num_open)
