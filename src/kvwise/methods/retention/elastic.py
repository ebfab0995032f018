"""Elastic Cache: the most attended tokens stay, and every other lives on in the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, Merge, PromptView, Retention
from kvwise.methods.retention.merging import mean_weights, nearest

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("paper", "released")


@dataclass(frozen=True)
class Elastic(Retention):
    """Elastic Cache, arXiv 2407.18121, per layer; all heads of a layer keep the same tokens.

    A token's score is the attention it received from all rows, on average of the heads. The first `sinks` tokens and
    the last stay, and of the others the best (of equals the earlier), together the `budget` share C of the prompt.
    Every dropped token is merged into the nearest kept one, which becomes the mean of itself and what came to it,
    keys and values alike; of two equally near ones the earlier takes it. While decoding, the token at a fixed index
    leaves: the first `C - distance` tokens, and the sinks, stay for good, and those behind come and go in order.

    Where a prompt has images, only image tokens are dropped, unless `text` gives up text too; text that alone is
    more than the budget loses its least attended tokens.

    `mode=released` repeats two slips of the authors' code, for comparing with it: a token of the middle stays if
    `argsort(score)` there, an index, is above the number of dropped tokens (one token fewer stays), and of a dropped
    token's stead the one `sinks` before it is merged. A sink that would be merged so is not.
    """

    budget: float = 0.2
    sinks: int = 4
    distance: int = 25
    text: bool = False
    mode: str = "paper"

    name: ClassVar[str] = "elastic"
    idea: ClassVar[str] = "keep what received most attention and merge each other token into the nearest kept one"
    paper: ClassVar[str] = "Elastic Cache, arXiv 2407.18121"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.NEEDS_EVERY_ROW, Trait.OWNS_PAGES, Trait.PRIVATE, Trait.LIVES_ON}
    )
    needs_mass: ClassVar[bool] = True
    tracks_mass: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("sinks", self.sinks >= 0, "0 or more")
        self.require("distance", self.distance >= 1, "at least 1")
        self.require("mode", self.mode in MODES, f"one of {', '.join(MODES)}")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least the sinks and one token."""
        return max(self.sinks + 1, int(num_prompt_tokens * self.budget))

    def keep(self, view: PromptView) -> Kept:
        """The best tokens of each layer, with all others merged into them."""
        assert view.mass is not None and view.capacity is not None
        score = view.mass.sum(1)  # [L, T]; a sum over heads ranks as their mean does
        if view.num_tokens <= view.capacity:
            kept = torch.ones_like(score, dtype=torch.bool)
        elif self.mode == "paper":
            kept = self._best(score, view)
        else:
            kept = self._released(score, view.capacity)
        limit = torch.full(view.shape, view.capacity, dtype=torch.int32, device=score.device)
        marks = self._first_in_line(kept, view.capacity)[:, None].expand(view.shape)
        merge = None if bool(kept.all()) else self._merge(kept, view.shape[1])
        return Kept(kept[:, None].expand(*view.shape, -1), limit, merge, marks)

    def worth(self, view: DecodeView) -> Tensor:
        """The oldest leaves, but for those before the fixed index."""
        return view.positions.float().masked_fill(view.positions < view.marks[..., None], torch.inf)

    def _best(self, score: Tensor, view: PromptView) -> Tensor:
        """By class, then by score [L, T], then the earlier."""
        rank = torch.zeros_like(view.positions)
        if view.spans and not self.text:
            rank += 1
            for first, stop in view.spans:
                rank[first:stop] = 0
        rank[: self.sinks] = 2
        rank[-1] = 2
        order = score.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, rank[order].argsort(dim=-1, descending=True, stable=True))
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[:, : view.capacity], True)

    def _released(self, score: Tensor, capacity: int) -> Tensor:
        kept = torch.ones_like(score, dtype=torch.bool)
        kept[:, self.sinks : -1] = score[:, self.sinks : -1].argsort(dim=-1) > score.shape[-1] - capacity
        return kept

    def _first_in_line(self, kept: Tensor, capacity: int) -> Tensor:
        """float32 [L]: the position of the token at the fixed index; those before it never leave."""
        fixed = max(self.sinks, capacity - self.distance)
        positions = kept.nonzero()[:, 1].view(len(kept), -1)  # every layer keeps as many
        to_come = torch.arange(capacity, device=kept.device) + kept.shape[-1]
        return torch.cat([positions, to_come.expand(len(kept), -1)], -1)[:, fixed].float()

    def _merge(self, kept: Tensor, num_heads: int) -> Merge:
        own = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
        times = torch.ones_like(kept, dtype=torch.float32)
        anchors = kept
        if self.mode == "released":
            anchors = kept.clone()
            anchors[:, : self.sinks] = anchors[:, -1] = False
            merged = torch.zeros_like(kept)  # which tokens the code takes for the dropped ones
            merged[:, : kept.shape[-1] - self.sinks] = ~kept[:, self.sinks :]
            times = kept + (merged & (anchors | ~kept) & anchors.any(-1, keepdim=True)).float()
        target = torch.where(kept, own, nearest(anchors))
        weights = mean_weights(target, times)
        target, weights = (t[:, None].expand(-1, num_heads, -1) for t in (target, weights))
        return Merge(target, weights, weights)
