"""SnapKV: the end of the prompt votes for the earlier tokens that stay; what is generated stays too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import max_pool1d, pad

from kvwise.core.method import Trait
from kvwise.methods.retention.base import Kept, PromptView, Retention, Spans
from kvwise.methods.retention.budgets import HEADS, LAYERS, each_head

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(Retention):
    """SnapKV, arXiv 2404.14469 section 4, per layer and KV head.

    The attention of the prompt's last `observed` rows votes for the tokens before them. A token's votes are the most
    that any of the `kernel` tokens around it got (max pooling, so that neighbours of a find stay with it); the best
    tokens and the observed ones stay, together the `budget` share of the prompt, and so does all that is generated:
    the cache grows while decoding. Of tokens with equal votes the earlier ones stay.

    Pooling by the maximum is what accounts of the paper's experiments report; the released code defaults to the
    average. A KV head shared by several query heads sums their votes (the paper selects per query
    head). Where the budget is less than twice `observed`, half of it observes, so that half can be chosen (the
    released code asks for a budget above `observed`). A request that is preempted keeps the same tokens: the rows
    of its output do not vote when they are computed again.

    `layers=pyramid` (PyramidKV) and `heads=adakv` (Ada-KV) let the number of chosen tokens differ (`budgets`).
    """

    budget: float = 0.2
    observed: int = 32
    kernel: int = 5
    layers: str = "uniform"
    heads: str = "uniform"

    name: ClassVar[str] = "snapkv"
    idea: ClassVar[str] = "keep what the end of the prompt attends to, the end itself, and all that is generated"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_LAST_ROWS, Trait.OWNS_PAGES, Trait.PRIVATE})
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("observed", self.observed >= 1, "at least 1")
        self.require("kernel", self.kernel >= 1, "at least 1")
        self.require("layers", self.layers in LAYERS, f"one of {', '.join(LAYERS)}")
        self.require("heads", self.heads in HEADS, f"one of {', '.join(HEADS)}")
        if HEADS[self.heads] is not each_head:  # more than the class says
            object.__setattr__(self, "traits", self.traits | {Trait.RAGGED_HEADS})

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least two tokens."""
        return max(2, int(num_prompt_tokens * self.budget))

    def observed_rows(self, num_prompt_tokens: int, spans: Spans = ()) -> int:
        """`observed`, or half the capacity if that is less."""
        capacity = self.capacity(num_prompt_tokens)
        assert capacity is not None
        return min(self.observed, capacity // 2)

    def keep(self, view: PromptView) -> Kept:
        """The tokens with the most votes, the observed ones, and all behind the prompt."""
        assert view.capacity is not None
        kept = torch.ones((*view.shape, view.num_tokens), dtype=torch.bool, device=view.positions.device)
        if view.num_prompt <= view.capacity:
            return Kept(kept)
        observed = self.observed_rows(view.num_prompt)
        older = view.num_prompt - observed
        num_chosen = LAYERS[self.layers](view.capacity - observed, older, view.shape[0])
        for layer in range(view.shape[0]):
            votes = pooled(view.rows(layer).sum((1, 2))[:, :older], self.kernel)
            kept[layer, :, :older] = HEADS[self.heads](votes, num_chosen[layer])
        return Kept(kept)


def pooled(votes: Tensor, kernel: int) -> Tensor:
    """For each token the largest of the `kernel` votes [H, T] around it."""
    before = kernel // 2
    return max_pool1d(pad(votes, (before, kernel - 1 - before)), kernel, stride=1)
