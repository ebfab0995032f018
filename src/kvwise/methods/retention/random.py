"""Random: the latest tokens and a random choice of the others stay. A control: the floor of every curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, PromptView, Retention, uniform

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B1  # odd, near 2**32 / golden ratio: different positions stay different


@dataclass(frozen=True)
class Random(Retention):
    """Every token has a priority that depends on `seed`, layer, KV head and position alone; the best stay.

    So the choice needs no state, is the same on every device, in every batch and after a preemption, and while
    decoding the worst token outside the latest `recent` gives way: at any time the `recent` latest tokens and the best
    of the others are kept, as many as the `budget` (a share of the prompt) allows. See `priorities`.
    """

    budget: float = 0.2
    seed: int = 0
    recent: int = 8

    name: ClassVar[str] = "random"
    idea: ClassVar[str] = "keep the latest tokens and a seeded random choice of the others"
    paper: ClassVar[str] = "- (control)"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.OWNS_PAGES, Trait.PRIVATE})

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("seed", 0 <= self.seed <= _MASK, f"0 to {_MASK}")
        self.require("recent", self.recent >= 1, "at least 1")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least one token."""
        return max(1, int(num_prompt_tokens * self.budget))

    def keep(self, view: PromptView) -> Kept:
        """The latest `recent` tokens and, of the others, those with the best priorities."""
        assert view.capacity is not None
        recent = min(self.recent, view.capacity)
        priority = priorities(self.seed, view.positions.expand(*view.shape, -1))
        priority = priority.masked_fill(view.positions >= view.num_tokens - recent, _MASK + 1)
        best = priority.topk(min(view.capacity, view.num_tokens), dim=-1).indices
        return uniform(view, torch.zeros_like(priority, dtype=torch.bool).scatter_(-1, best, True))

    def worth(self, view: DecodeView) -> Tensor:
        """The priority; the latest `recent` must stay."""
        first_recent = view.num_tokens[:, None, None] - view.limit.clamp(max=self.recent)
        worth = priorities(self.seed, view.positions).double()
        return worth.masked_fill(view.positions >= first_recent[..., None], torch.inf)


def priorities(seed: int, positions: Tensor) -> Tensor:
    """Priorities int64 in 0 .. 2**32 - 1 of positions [..., L, H, S]; no two positions of a head have the same.

    `h = mix(mix(mix(seed) + layer) + head)`, then `mix(h + position * 0x9E3779B1)`, all modulo 2**32.
    """
    num_layers, num_heads = positions.shape[-3:-1]
    device = positions.device
    layers = torch.arange(num_layers, device=device)[:, None, None]
    heads = torch.arange(num_heads, device=device)[:, None]
    start = _mix(_mix(_mix(torch.tensor(seed, device=device)) + layers) + heads)
    return _mix(start + positions.long() * _STEP)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (fmix32): a permutation of the 32-bit numbers, on the low half of int64.

    A product may overflow int64; it wraps, and its low 32 bits are right.
    """
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
