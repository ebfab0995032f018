"""Marking: which held tokens the newest row attends to as more than one among all."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mark(mass: Sequence[Tensor], marked: Sequence[Tensor], slots: Sequence[Tensor], used: Tensor, bound: Tensor,
         position: Tensor) -> None:  # fmt: skip
    """Note `position` [B] at every token whose mass of the last row is at least `bound` [B, L, H], and clear the mass.

    Tokens lie in several places: `mass[i]` and `marked[i]` are float32 columns, `slots[i]` int64 [B, L, H, S_i] slots
    of them; `used` bool [B, L, H, S], S the sum of all S_i, tells which are tokens.
    """
    start = 0
    for received, noted, where in zip(mass, marked, slots, strict=True):
        mine = used[..., start : start + where.shape[-1]]
        start += where.shape[-1]
        got = received.view(-1)[where]
        chosen = mine & (got >= bound[..., None])
        noted.view(-1)[where[chosen]] = position[:, None, None, None].expand_as(where)[chosen].float()
        received.view(-1)[where[mine]] = 0.0


def slots_in(tables: Tensor, size: int) -> Tensor:
    """All slots int64 [..., N * size] of page tables [..., N], in table order."""
    inside = torch.arange(size, device=tables.device)
    return (tables.long()[..., None] * size + inside).flatten(-2)
