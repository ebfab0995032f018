"""Marking: which held tokens the newest row attends to as more than one among all."""

import torch
from torch import Tensor


def mark(mass: Tensor, marked: Tensor, pages: Tensor, bound: Tensor, position: Tensor) -> None:
    """Note a position at every slot whose mass of the last row is at least a bound, and clear the mass.

    `mass` and `marked` are float32 columns [P, size]; `pages` int64 [n] are different pages, of heads whose bound is
    `bound` float32 [n] and whose newest row is at `position` float32 [n], larger than any noted before. Slots of a page
    that hold no token may be marked too: they start afresh when they are written.
    """
    noted = (mass.index_select(0, pages) >= bound[:, None]).float().mul_(position[:, None])
    marked.index_copy_(0, pages, torch.maximum(noted, marked.index_select(0, pages)))
    mass.index_fill_(0, pages, 0.0)
