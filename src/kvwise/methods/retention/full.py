"""Full: every token stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.methods.retention.base import DecodeView, PromptView, Retention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Full(Retention):
    """Keep everything: the reference all others are measured against."""

    name: ClassVar[str] = "full"
    idea: ClassVar[str] = "keep every token"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """No limit."""
        return None

    def keep(self, view: PromptView) -> Tensor:
        """Never asked: there is no limit."""
        raise AssertionError("full retention has no capacity to keep to")

    def victims(self, view: DecodeView) -> Tensor:
        """Never asked: there is no limit."""
        raise AssertionError("full retention has no victims")
