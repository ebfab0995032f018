"""VL-Cache: the text behind the images chooses what stays, and layers that look at more of it get more."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import Kept, PromptView, Retention, Spans
from kvwise.methods.retention.budgets import best

if TYPE_CHECKING:
    from torch import Tensor

LEAST = Fraction(1, 100)  # share of the prompt that every layer keeps


@dataclass(frozen=True)
class VLCache(Retention):
    """VL-Cache, arXiv 2410.23317: once after prefill, layer budgets by sparsity, then per KV head.

    The rows behind the last image token observe. In each of them, by query head, attention below `p` of the row's
    largest counts as nothing; what is left is a layer's density, and layers share the `budget` (of the prompt) in
    proportion, each between 1 % (the budget, if that is less) and all of the prompt. Of a layer's budget the part
    `recent` goes to the latest tokens, the rest to those with the most attention from the observing rows, summed over
    the query heads of a KV head; of equals the earlier stays. All that is generated stays.

    In a prompt without images, or with nothing behind the last, the last `observed` rows observe; `text=true` lets
    them do so whatever the prompt holds (the paper's speed test does, with 50). Where the 1 % lifts the mean
    above the budget, the layers above it give back in proportion; the paper lets the cache be larger.
    """

    budget: float = 0.1
    p: float = 0.01
    recent: float = 0.1
    text: bool = False
    observed: int = 50

    name: ClassVar[str] = "vlcache"
    idea: ClassVar[str] = "keep what the text behind the images attends to, more in layers that attend to more"
    paper: ClassVar[str] = "VL-Cache, arXiv 2410.23317"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_LAST_ROWS, Trait.OWNS_PAGES, Trait.PRIVATE})
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("p", 0 < self.p <= 1, "above 0, at most 1")
        self.require("recent", 0 <= self.recent <= 1, "0 to 1")
        self.require("observed", self.observed >= 1, "at least 1")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least two tokens."""
        return max(2, int(num_prompt_tokens * self.budget))

    def observed_rows(self, num_prompt_tokens: int, spans: Spans = ()) -> int:
        """Those behind the last image; `observed` where there are none."""
        behind = 0 if self.text or not spans else num_prompt_tokens - max(stop for _, stop in spans)
        return behind if behind > 0 else min(self.observed, num_prompt_tokens)

    def keep(self, view: PromptView) -> Kept:
        """By layer, the latest tokens and those with the highest scores, and all behind the prompt."""
        assert view.capacity is not None
        kept = torch.ones((*view.shape, view.num_tokens), dtype=torch.bool, device=view.positions.device)
        if view.num_prompt <= view.capacity:
            return Kept(kept)
        scores, num_dense = self._observe(view)
        for layer, num_kept in enumerate(self._num_kept(num_dense, view.num_prompt, view.capacity)):
            num_recent = max(1, int(num_kept * self.recent))
            older = view.num_prompt - num_recent
            num_chosen = torch.tensor(num_kept - num_recent).expand(view.shape[1])
            kept[layer, :, :older] = best(scores[layer][:, :older], num_chosen)
        return Kept(kept)

    def _observe(self, view: PromptView) -> tuple[list[Tensor], list[int]]:
        """Of each layer the scores [H, T] and how many pairs of row and token are dense; all layers have as many."""
        scores, num_dense = [], []
        for layer in range(view.shape[0]):
            rows = view.rows(layer)
            scores.append(rows.sum((1, 2)))
            num_dense.append(int((rows >= self.p * rows.amax(-1, keepdim=True)).sum()))
        return scores, num_dense

    def _num_kept(self, num_dense: list[int], num_prompt: int, capacity: int) -> list[int]:
        """Prompt tokens that each layer's heads keep; their mean is within the capacity."""
        total = capacity * len(num_dense)
        least = min(max(Fraction(1), LEAST * num_prompt), Fraction(capacity))
        share = [min(max(Fraction(dense * total, sum(num_dense)), least), Fraction(num_prompt)) for dense in num_dense]
        above, room = sum(share) - least * len(share), total - least * len(share)
        if above > room:
            share = [least + (tokens - least) * room / above for tokens in share]
        return [int(tokens) for tokens in share]
