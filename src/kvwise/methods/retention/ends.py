"""The two ends of a text: what methods share that keep its first tokens (or none) and its latest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kvwise.methods.retention.base import DecodeView, PromptView


def keep_ends(view: PromptView, num_first: int) -> Tensor:
    """The first `num_first` tokens and as many of the latest as the capacity leaves: bool [L, H, T]."""
    num_latest = view.capacity - num_first
    kept = (view.positions < num_first) | (view.positions >= view.num_tokens - num_latest)
    return kept.expand(*view.shape, -1)


def oldest(view: DecodeView, num_first: int) -> Tensor:
    """The oldest token behind the first `num_first`: int64 [B, L, H]."""
    protected = (view.positions < num_first) | ~view.used
    return view.positions.masked_fill(protected, torch.iinfo(torch.int32).max).argmin(-1)
