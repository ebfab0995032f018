"""The two ends of a text: what methods share that keep its first tokens (or none) and its latest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvwise.methods.retention.base import Kept, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from kvwise.methods.retention.base import DecodeView, PromptView


def keep_ends(view: PromptView, num_first: int) -> Kept:
    """The first `num_first` tokens and as many of the latest as the capacity leaves."""
    assert view.capacity is not None
    num_latest = view.capacity - num_first
    mask = (view.positions < num_first) | (view.positions >= view.num_tokens - num_latest)
    return uniform(view, mask.expand(*view.shape, -1))


def latest_worth_most(view: DecodeView, num_first: int) -> Tensor:
    """The later, the more a token is worth, and the first `num_first` are beyond price: float [B, L, H, S]."""
    return view.positions.float().masked_fill(view.positions < num_first, torch.inf)
