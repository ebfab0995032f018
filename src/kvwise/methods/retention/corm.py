"""CORM: a token stays as long as one of the latest rows finds it important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import Kept, PromptView, Retention, Spans

if TYPE_CHECKING:
    from torch import Tensor

    from kvwise.methods.retention.base import DecodeView


@dataclass(frozen=True)
class Corm(Retention):
    """CORM, arXiv 2404.15949, per layer and KV head: no budget, the text decides how much stays.

    A row marks the tokens that get at least the share 1 / (number of keys of the row) of its attention, averaged over
    the query heads of a KV head. A token stays if any of the last `window` rows marked it or it is among the `recent`
    latest; nothing leaves a head that holds no more than `window` + `recent` tokens.

    What decoding leaves behind is swept out every 16 tokens of the output, not after each (the paper's rule), so
    that a head may meanwhile hold up to 15 tokens more. Before the prompt is cut a row's keys are all tokens up to
    its own, in layers with a sliding window too. The rows of an output that is computed again after a preemption mark
    nothing: the prompt's last rows stand in for them, and all of that output stays until the next sweep that is due.
    """

    window: int = 256
    recent: int = 256

    name: ClassVar[str] = "corm"
    idea: ClassVar[str] = "keep the latest tokens and those that one of the latest rows finds important"
    paper: ClassVar[str] = "CORM, arXiv 2404.15949"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.NEEDS_LAST_ROWS, Trait.OWNS_PAGES, Trait.PRIVATE, Trait.RAGGED_HEADS}
    )
    grows: ClassVar[bool] = True
    marks_rows: ClassVar[bool] = True
    sweep_interval: ClassVar[int | None] = 16

    def __post_init__(self) -> None:
        self.require("window", self.window >= 1, "at least 1")
        self.require("recent", self.recent >= 1, "at least 1")

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """No limit: it may all be important."""
        return None

    def observed_rows(self, num_prompt_tokens: int, spans: Spans = ()) -> int:
        """`window`, or all there are."""
        return min(self.window, num_prompt_tokens)

    def keep(self, view: PromptView) -> Kept:
        """What the prompt's last rows marked, the latest tokens, and all behind the prompt."""
        num_again = view.num_tokens - view.num_prompt
        marked = torch.full((*view.shape, view.num_tokens), view.num_tokens - 1.0, device=view.positions.device)
        for layer in range(view.shape[0]):
            row = _last_marking_row(view.rows(layer), view.num_prompt)[:, : view.num_prompt]
            marked[layer, :, : view.num_prompt] = torch.where(row > 0, row + num_again, 0.0)
        num_held = torch.tensor(view.num_tokens, device=view.positions.device)
        return Kept(self._stays(marked, view.positions, num_held, num_held), mass=marked)

    def stays(self, view: DecodeView) -> Tensor:
        """What the last rows marked, the latest tokens, and all of a head that holds few."""
        assert view.mass is not None
        num_tokens = view.num_tokens[:, None, None, None]
        return self._stays(view.mass, view.positions, num_tokens, view.used.sum(-1, keepdim=True))

    def _stays(self, marked: Tensor, positions: Tensor, num_tokens: Tensor, num_held: Tensor) -> Tensor:
        """`marked` are positions of rows; 0, where none marked a token, is too long ago once anything leaves."""
        is_marked, is_recent = marked >= num_tokens - self.window, positions >= num_tokens - self.recent
        return is_marked | is_recent | (num_held <= self.window + self.recent)


def _last_marking_row(rows: Tensor, num_prompt: int) -> Tensor:
    """The position of the last of the rows [H, G, W, T] that marked each token, 0 where none did: float32 [H, T]."""
    positions = torch.arange(num_prompt - rows.shape[2], num_prompt, dtype=torch.float32, device=rows.device)[:, None]
    is_marked = rows.mean(1) >= 1 / (positions + 1)
    return (is_marked * positions).amax(1)
