"""Heirs: who takes over the tokens that leave the pages of settled requests."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvwise.engine.placement.page_state import Heads
from kvwise.methods.retention.base import Kept, Residual


class Heir(Protocol):
    """Is told of every token that leaves, before its slot is used again."""

    def start(self, row: int, kept: Kept) -> None:
        """A request settles in this row. What is not kept leaves next."""
        ...

    def take(self, heads: Heads, keys: Tensor, values: Tensor, positions: Callable[[], Tensor]) -> None:
        """Tokens leave, in the order of their rows, layers and heads: keys (rotated) and values [n, D].

        Their positions int [n] are looked up for who asks.
        """
        ...


class Folding:
    """What leaves is folded into a method's residual."""

    def __init__(self, residual: Residual, device: torch.device) -> None:
        self._residual = residual
        self._device = device

    def start(self, row: int, kept: Kept) -> None:
        """Nothing is folded yet."""
        self._residual.start(row)

    def take(self, heads: Heads, keys: Tensor, values: Tensor, positions: Callable[[], Tensor]) -> None:
        """Fold."""
        rows, layers, places = (torch.from_numpy(part).to(self._device) for part in heads.place)
        self._residual.fold(rows, layers, places, keys, values)
