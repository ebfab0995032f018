"""KVMerger: runs of similar keys become one token each; what is generated stays too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import Kept, Merge, PromptView, Retention
from kvwise.methods.retention.merging import gaussian_sets, neighbour_cosines

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVMerger(Retention):
    """KVMerger, arXiv 2407.08454, per layer and KV head, on the prompt's rotated keys.

    Neighbours whose keys have a cosine of at least epsilon are in one set, and a set becomes one token: see
    `merging.gaussian_sets`. The `recent` latest tokens and the `heavy` ones with the most attention (shares of what a
    head may keep) are in no set. What is generated stays as it is: the cache grows while decoding.

    The paper finds an epsilon for a model and a budget once, and heads end up with different lengths. Here epsilon is
    found in each prompt: the largest that, the same for all layers and heads, brings their average down to the
    `budget` share of the prompt. A `threshold` (the paper's epsilon is told to be about 0.75) merges neighbours from
    that cosine on, and the budget is a bound: epsilon is lower where it would be exceeded.

    The `first` layers and the `last` stay whole, and the others make up for them, as long as these keep half of the
    budget: of a model with few layers fewer stay whole, the last being the first to go.
    """

    budget: float = 0.5
    threshold: float | None = None
    heavy: float = 0.25
    recent: float = 0.25
    first: int = 2
    last: int = 1

    name: ClassVar[str] = "kvmerger"
    idea: ClassVar[str] = "merge runs of similar keys into one token each, and keep all that is generated"
    paper: ClassVar[str] = "KVMerger, arXiv 2407.08454"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.NEEDS_EVERY_ROW, Trait.OWNS_PAGES, Trait.PRIVATE, Trait.LIVES_ON, Trait.RAGGED_HEADS}
    )
    needs_mass: ClassVar[bool] = True
    tracks_mass: ClassVar[bool] = False
    grows: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("threshold", self.threshold is None or -1 <= self.threshold <= 1, "-1 to 1")
        self.require("heavy", 0 <= self.heavy <= 1, "0 to 1")
        self.require("recent", 0 <= self.recent <= 1, "0 to 1")
        self.require("first", self.first >= 0, "0 or more")
        self.require("last", self.last >= 0, "0 or more")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least two tokens."""
        return max(2, int(num_prompt_tokens * self.budget))

    def keep(self, view: PromptView) -> Kept:
        """The pivots of all sets, single tokens being sets of one, and all behind the prompt."""
        assert view.mass is not None and view.capacity is not None
        mask = torch.ones((*view.shape, view.num_tokens), dtype=torch.bool, device=view.positions.device)
        if view.num_prompt <= view.capacity:
            return Kept(mask)
        target = torch.arange(view.num_tokens, device=mask.device).expand(mask.shape).clone()
        weights = [torch.ones(mask.shape, device=mask.device) for _ in range(2)]
        layers, capacity = self.merged_layers(view.shape[0], view.num_prompt, view.capacity)
        mass = view.mass[..., : view.num_prompt]
        joined = self._joined(view, mass[layers.start : layers.stop], layers, capacity)
        for layer, links in zip(layers, joined, strict=True):
            found = gaussian_sets(links, view.keys(layer)[:, : view.num_prompt], mass[layer])
            for all_layers, of_layer in zip((target, *weights), found, strict=True):
                all_layers[layer, :, : view.num_prompt] = of_layer
        own = torch.arange(view.num_tokens, device=mask.device)
        return Kept(target == own, merge=Merge(target, *weights))

    def merged_layers(self, num_layers: int, num_tokens: int, capacity: int) -> tuple[range, int]:
        """The layers that merge, and how many tokens a head of theirs may keep on average."""
        first = min(self.first, num_layers - 1)
        last = min(self.last, num_layers - 1 - first)
        while True:
            layers = range(first, num_layers - last)
            left = (num_layers * capacity - (first + last) * num_tokens) // len(layers)
            if first + last == 0 or left >= max(2, capacity / 2):
                return layers, left
            first, last = (first, last - 1) if last else (first - 1, last)

    def _joined(self, view: PromptView, mass: Tensor, layers: range, capacity: int) -> Tensor:
        """bool [merged layers, H, T - 1]: which tokens are in one set with the next."""
        protected = self._protected(mass, capacity)
        cosines = torch.stack([neighbour_cosines(view.keys(layer)[:, : view.num_prompt]) for layer in layers])
        cosines.masked_fill_(protected[..., :-1] | protected[..., 1:], -torch.inf)
        num_heads = cosines.shape[0] * cosines.shape[1]
        needed = num_heads * (view.num_prompt - capacity)
        epsilon = cosines.flatten().topk(needed).values[-1]
        if self.threshold is not None:
            epsilon = epsilon.clamp(max=self.threshold)
        return cosines >= epsilon

    def _protected(self, mass: Tensor, capacity: int) -> Tensor:
        """bool [..., T]; so few that heads whose other tokens are all merged, run by run, keep `capacity` at most."""
        recent = max(1, min(int(capacity * self.recent), capacity - 1))
        heavy = min(int(capacity * self.heavy), (capacity - recent - 1) // 2)
        older = mass.shape[-1] - recent
        protected = torch.zeros_like(mass, dtype=torch.bool)
        protected.scatter_(-1, mass[..., :older].topk(heavy, dim=-1).indices, True)
        protected[..., older:] = True
        return protected
