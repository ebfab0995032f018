"""ReFreeKV: drop the least important tokens until the last row's attention would lose too much of its norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import Kept, PromptView, Retention, Spans
from kvwise.methods.retention.snapkv import pooled

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReFreeKV(Retention):
    """ReFreeKV (first called DBudgetKV), arXiv 2502.16886: a threshold instead of a budget, per layer, once.

    Tokens are ranked per KV head; of each layer's heads the same number leaves, the least important of each: as many
    as take at most the share `threshold` from the norm of the last row's attention to the ranked tokens, a mean over
    all *query* heads (those of one KV head lose the same tokens). All that is generated stays.

    `ranking`: streaming, by age, the first `sinks` tokens excepted, which stay; h2o, by the attention of all prompt
    rows; snapkv, by that of the last `window` rows, pooled over `kernel` tokens. The latter two sum over the query
    heads of a KV head and except the last `window` tokens. Of equals the earlier stays.

    Ranking by age and a threshold of 0.01 are what accounts of the paper tell; the released code's example is
    `ranking=h2o, threshold=0.05`, its h2o sums the last `window` rows only, and its snapkv pools by the average. At 0
    nothing is dropped. Rows of an output that is computed again after a preemption count in the ranking by h2o.
    """

    threshold: float = 0.01
    ranking: str = "streaming"
    window: int = 32
    kernel: int = 5
    sinks: int = 4

    name: ClassVar[str] = "refreekv"
    idea: ClassVar[str] = "drop the least important tokens while the last row's attention keeps its norm"
    paper: ClassVar[str] = "ReFreeKV / DBudgetKV, arXiv 2502.16886"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_LAST_ROWS, Trait.OWNS_PAGES, Trait.PRIVATE})
    tracks_mass: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("threshold", 0 <= self.threshold < 1, "at least 0, below 1")
        self.require("ranking", self.ranking in _RANKINGS, f"one of {', '.join(_RANKINGS)}")
        self.require("window", self.window >= 1, "at least 1")
        self.require("kernel", self.kernel >= 1, "at least 1")
        self.require("sinks", self.sinks >= 0, "0 or more")
        if _RANKINGS[self.ranking] is _by_mass:  # the one that needs more than the class says
            object.__setattr__(self, "needs_mass", True)
            object.__setattr__(self, "traits", self.traits | {Trait.NEEDS_EVERY_ROW})

    @property
    def drops(self) -> bool:
        """Unless the threshold is 0."""
        return self.threshold > 0

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """No limit: the prompt decides."""
        return None

    def observed_rows(self, num_prompt_tokens: int, spans: Spans = ()) -> int:
        """The last row, and those that vote."""
        return min(self.window, num_prompt_tokens) if self.ranking == "snapkv" else 1

    def keep(self, view: PromptView) -> Kept:
        """All but the longest run of least important tokens that the last row can do without."""
        kept = torch.ones((*view.shape, view.num_tokens), dtype=torch.bool, device=view.positions.device)
        for layer in range(view.shape[0] if self.threshold else 0):
            rows = view.rows(layer)
            order = _RANKINGS[self.ranking](self, view, layer, rows)
            if order.shape[-1]:
                kept[layer].scatter_(-1, order[:, : self._num_dropped(rows[:, :, -1], order)], False)
        return Kept(kept)

    def _num_dropped(self, row: Tensor, order: Tensor) -> int:
        """How many of `order` [H, n], least important first, may go by the attention row [H, G, T]: below n."""
        squares = row.double().square().gather(-1, order[:, None].expand(-1, row.shape[1], -1))
        norm = squares.flip(-1).cumsum(-1).flip(-1).sqrt().mean((0, 1))  # of what is left without the first m: [n]
        return int((norm >= (1 - self.threshold) * norm[0]).sum()) - 1


def _by_mass(method: ReFreeKV, view: PromptView, layer: int, rows: Tensor) -> Tensor:
    """Tokens before the window by what they received: int64 [H, n], the least first; so for all rankings."""
    assert view.mass is not None
    return _worst_first(view.mass[layer, :, : max(0, view.num_prompt - method.window)])


def _by_votes(method: ReFreeKV, view: PromptView, layer: int, rows: Tensor) -> Tensor:
    votes = rows.sum((1, 2))[:, : max(0, view.num_prompt - method.window)]
    return _worst_first(pooled(votes, method.kernel) if votes.shape[-1] else votes)


def _by_age(method: ReFreeKV, view: PromptView, layer: int, rows: Tensor) -> Tensor:
    first = min(method.sinks, view.num_prompt)
    return torch.arange(first, view.num_prompt, device=rows.device).expand(view.shape[1], -1)


def _worst_first(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True).flip(-1)


_RANKINGS: Mapping[str, Callable[[ReFreeKV, PromptView, int, Tensor], Tensor]] = {
    "streaming": _by_age,
    "h2o": _by_mass,
    "snapkv": _by_votes,
}
