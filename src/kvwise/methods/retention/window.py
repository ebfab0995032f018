"""Window: only the latest tokens stay. A control: whoever remembers more than this has chosen well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, PromptView, Retention
from kvwise.methods.retention.ends import keep_ends, latest_worth_most

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window(Retention):
    """Window attention, the baseline of arXiv 2309.17453 (figure 1b); `streaming` adds the sinks that it lacks.

    `budget` is the share of the prompt that stays, its latest tokens; while decoding the window moves on. Keys keep
    the rotation of their original position.
    """

    budget: float = 0.2

    name: ClassVar[str] = "window"
    idea: ClassVar[str] = "keep the latest tokens"
    paper: ClassVar[str] = "- (control)"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.OWNS_PAGES, Trait.PRIVATE})

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least one token."""
        return max(1, int(num_prompt_tokens * self.budget))

    def keep(self, view: PromptView) -> Kept:
        """The latest tokens."""
        return keep_ends(view, num_first=0)

    def worth(self, view: DecodeView) -> Tensor:
        """The oldest token leaves."""
        return latest_worth_most(view, num_first=0)
