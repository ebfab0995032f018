"""H2O: the latest tokens and those that have received the most attention (heavy hitters) stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, PromptView, Retention
from kvwise.methods.retention.budgets import HEADS, LAYERS, each_head

if TYPE_CHECKING:
    from torch import Tensor

_INFINITE = 0x7F800000  # as the bits of a float32


@dataclass(frozen=True)
class H2O(Retention):
    """Heavy-Hitter Oracle, arXiv 2306.14048, Algorithm 1 with local (causal) statistics, per layer and KV head.

    `budget` is the share of the prompt that stays, `recent` the part of it that is the latest tokens (the paper's
    heavy ratio 0.1 + recent ratio 0.1 are `budget=0.2, recent=0.5`). A KV head shared by several query heads sums
    their attention. Keys keep their original rotation. Budget 1 drops nothing, also while decoding.

    The paper's sum favours early tokens, which more rows could see. `normalised` (not in the paper) divides it by
    their number, the token's own row among them; a sliding window, which ends a token's time, is not counted in.

    `layers=pyramid` and `heads=adakv` let the number of heavy hitters differ (`budgets`); the latest are as many
    everywhere. While decoding every head holds as many tokens as it chose.
    """

    budget: float = 0.2
    recent: float = 0.5
    normalised: bool = False
    layers: str = "uniform"
    heads: str = "uniform"

    name: ClassVar[str] = "h2o"
    idea: ClassVar[str] = "keep the latest tokens and those that received most attention"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_EVERY_ROW, Trait.OWNS_PAGES, Trait.PRIVATE})
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("recent", 0 <= self.recent <= 1, "0 to 1")
        self.require("layers", self.layers in LAYERS, f"one of {', '.join(LAYERS)}")
        self.require("heads", self.heads in HEADS, f"one of {', '.join(HEADS)}")
        if HEADS[self.heads] is not each_head:  # more than the class says
            object.__setattr__(self, "traits", self.traits | {Trait.RAGGED_HEADS})

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    @property
    def ranks_by_mass(self) -> bool:
        """Unless the mass is divided."""
        return not self.normalised

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least two tokens."""
        return max(2, int(num_prompt_tokens * self.budget))

    def num_recent(self, capacity: int) -> int:
        """How many of `capacity` tokens are the latest ones; at least one, the newest token itself."""
        return max(1, int(capacity * self.recent))

    def keep(self, view: PromptView) -> Kept:
        """The `recent` last tokens and, of the others, those with the largest mass; of equals the earlier."""
        assert view.mass is not None and view.capacity is not None
        kept = torch.ones_like(view.mass, dtype=torch.bool)
        recent = self.num_recent(view.capacity)
        marks = torch.full(view.shape, float(recent), device=kept.device)
        if view.num_tokens <= view.capacity:
            return Kept(kept, torch.full(view.shape, view.capacity, dtype=torch.int32, device=kept.device), marks=marks)
        older = view.num_tokens - recent
        score = self._score(view.mass, view.positions, view.num_tokens)[..., :older]
        num_heavy = LAYERS[self.layers](view.capacity - recent, view.num_prompt - recent, view.shape[0])
        kept[..., :older] = HEADS[self.heads](score, num_heavy)
        return Kept(kept, kept.sum(-1, dtype=torch.int32), marks=marks)

    def worth(self, view: DecodeView) -> Tensor:
        """The mass; the latest, as many as the marks say, must stay."""
        assert view.mass is not None
        num_tokens = view.num_tokens[:, None, None, None]
        score = self._score(view.mass, view.positions, num_tokens)
        last_older = (num_tokens - view.marks[..., None]).int() - 1
        # Infinite behind that position, 0 up to it, made of bits: torch takes several times as long over a mask.
        latest = (view.positions - last_older).clamp_(0, 1).mul_(_INFINITE).view(torch.float32)
        return score + latest

    def _score(self, mass: Tensor, positions: Tensor, num_tokens: Tensor | int) -> Tensor:
        """What tokens are ranked by; as many rows could see each as tokens have come since, itself included."""
        return mass / (num_tokens - positions) if self.normalised else mass
