"""Streaming: the first tokens (attention sinks) and the latest ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, PromptView, Retention
from kvwise.methods.retention.ends import keep_ends, latest_worth_most

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Streaming(Retention):
    """StreamingLLM, arXiv 2309.17453 section 3: `sinks` first tokens and a window of the latest.

    `budget` is the share of the prompt that stays, sinks included; `window` gives the number of latest tokens
    instead. Keys keep the rotation of their original position (the paper re-indexes positions inside the cache,
    which differs only once a text outgrows the trained context).
    """

    budget: float = 0.2
    sinks: int = 4
    window: int | None = None

    name: ClassVar[str] = "streaming"
    idea: ClassVar[str] = "keep the first tokens and a window of the latest"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.OWNS_PAGES, Trait.PRIVATE})

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("sinks", self.sinks >= 0, "0 or more")
        self.require("window", self.window is None or self.window >= 1, "at least 1")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1 and no window is set."""
        return self.budget < 1 or self.window is not None

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """Sinks plus window."""
        if self.window is not None:
            return self.sinks + self.window
        return max(self.sinks + 1, int(num_prompt_tokens * self.budget))

    def keep(self, view: PromptView) -> Kept:
        """The first `sinks` and as many of the last as the capacity leaves."""
        return keep_ends(view, self.sinks)

    def worth(self, view: DecodeView) -> Tensor:
        """The oldest token that is no sink leaves."""
        return latest_worth_most(view, self.sinks)
