"""Stretches: the page tables and lengths under which a step's requests, laid out in runs, are attended to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.strided_part import Stretch
from kvwise.methods.retention.strided import Layout, Run

Geometry = tuple[tuple[int, int, int], ...]  # of each run: whose row, first slot, pages
MOST_KNOWN = 64  # tables held


@dataclass(frozen=True, slots=True)
class Found:
    """Slots of a page, query_start, the open runs, others that meet queries as they are, and those that do not.

    The latter meet queries that turn by `turns` int64 [F, T] positions.
    """

    unit: int
    query_start: Tensor
    open: Stretch
    others: list[Stretch]
    turned: list[Stretch]
    turns: Tensor


class Stretches:
    """Builds stretches, and remembers their tables: once all slots are in use, only lengths and turns change."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device = device
        self._size = block_size
        self._known: dict[tuple[int, Geometry], Tensor] = {}

    def forget(self, row: int) -> None:
        """A row has other pages."""
        self._known.clear()

    def of(
        self, rows: Sequence[int], layouts: Sequence[Layout], ends: Sequence[int], counts: Sequence[int], slots: Tensor
    ) -> Found:
        """How the rows' runs are attended to, with so many new tokens from slot `ends` on.

        slots: int64 [R, L, H, S] of every row.
        """
        split = [_split(layout) for layout in layouts]
        others = [[run for run in runs if not run.turn] for runs, _ in split]
        turned = [[run for run in runs if run.turn] for runs, _ in split]
        opened = [Run(first, end - first + n) for (_, first), end, n in zip(split, ends, counts, strict=True)]
        unit = math.gcd(self._size, *(run.start for runs in (opened, *others, *turned) for run in runs))

        def side_by_side(runs: Sequence[Sequence[Run]]) -> list[list[Run]]:
            return [[_nth(of, i) for of in runs] for i in range(max(map(len, runs)))]

        across = side_by_side(turned)
        turns = [np.repeat([run.turn for run in runs], counts) for runs in across]
        return Found(
            unit,
            self._counts([0, *np.cumsum(counts)]),
            self._stretch(rows, opened, unit, slots),
            [self._stretch(rows, runs, unit, slots) for runs in side_by_side(others)],
            [self._stretch(rows, runs, unit, slots) for runs in across],
            torch.from_numpy(np.array(turns, dtype=np.int64)).to(self._device),
        )

    def _stretch(self, rows: Sequence[int], runs: Sequence[Run], unit: int, slots: Tensor) -> Stretch:
        lengths = self._counts([run.length for run in runs])
        geometry = tuple((row, run.start, -(-run.length // unit)) for row, run in zip(rows, runs, strict=True))
        key = unit, geometry
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._tables(rows, runs, unit, slots)
        return Stretch(self._known[key], lengths[:, None].expand(-1, slots.shape[2]).contiguous())

    def _tables(self, rows: Sequence[int], runs: Sequence[Run], unit: int, slots: Tensor) -> Tensor:
        """int32 [L, B, H, N]: pages of `unit` slots, 0 behind a run's last."""
        width = max(1, max(-(-run.length // unit) for run in runs))
        tables = torch.zeros((slots.shape[1], len(rows), slots.shape[2], width), dtype=torch.int32, device=self._device)
        for b, (row, run) in enumerate(zip(rows, runs, strict=True)):
            found = slots[row, ..., run.start : run.start + run.length : unit] // unit
            tables[:, b, :, : found.shape[-1]] = found.to(torch.int32)
        return tables

    def _counts(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)


def _split(layout: Layout) -> tuple[list[Run], int]:
    """The runs that stand alone, and the first slot of that which new tokens go on with."""
    runs = list(layout.runs)
    if runs and runs[-1].start + runs[-1].length == layout.end:
        return runs[:-1], runs.pop().start
    return runs, layout.end


def _nth(runs: Sequence[Run], index: int) -> Run:
    return runs[index] if index < len(runs) else Run(0, 0)
