"""Full: every token stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvwise.methods.retention.base import Kept, PromptView, Retention


@dataclass(frozen=True)
class Full(Retention):
    """Keep everything: the reference all others are measured against."""

    name: ClassVar[str] = "full"
    idea: ClassVar[str] = "keep every token"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    @property
    def drops(self) -> bool:
        """Nothing."""
        return False

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """No limit."""
        return None

    def keep(self, view: PromptView) -> Kept:
        """All."""
        mask = torch.ones((*view.shape, view.num_tokens), dtype=torch.bool, device=view.positions.device)
        return Kept(mask)
