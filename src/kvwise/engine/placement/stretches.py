"""Stretches: the page tables and lengths under which a step's requests, laid out in runs, are attended to."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.strided_part import Stretch, Turned
from kvwise.methods.retention.strided import Layout, Run

Geometry = tuple[tuple[int, int, int], ...]  # of each run: whose row, first slot, pages
MOST_KNOWN = 64  # tables held


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
    ) -> tuple[int, Tensor, Stretch, list[Stretch], Turned | None]:
        """Slots of a page, query_start, the open runs, others that meet queries as they are, and those that do not.

        `ends`: where each row's new tokens, so many, begin. slots: int64 [R, L, H, S] of every row.
        """
        split = [_split(layout) for layout in layouts]
        others = [[run for run in runs if not run.turn] for runs, _ in split]
        turned = [[run for run in runs if run.turn] for runs, _ in split]
        opened = [Run(first, end - first + n) for (_, first), end, n in zip(split, ends, counts, strict=True)]
        unit = math.gcd(self._size, *(run.start for runs in (opened, *others, *turned) for run in runs))
        start = self._counts([0, *np.cumsum(counts)])
        return (
            unit,
            start,
            self._stretch(rows, opened, unit, slots),
            [
                self._stretch(rows, [_nth(runs, i) for runs in others], unit, slots)
                for i in range(max(len(runs) for runs in others))
            ],
            self._turned(rows, turned, counts, unit, slots),
        )

    def _turned(
        self, rows: Sequence[int], turned: Sequence[Sequence[Run]], counts: Sequence[int], unit: int, slots: Tensor
    ) -> Turned | None:
        most = max(len(runs) for runs in turned)
        if not most:
            return None
        runs = [_nth(of, i) for of in turned for i in range(most)]
        many = np.repeat(counts, most)
        firsts = np.cumsum(counts) - counts
        row_of = [np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True) for _ in range(most)]
        starts = np.concatenate([[0], np.cumsum(many)])
        places = [
            starts[b * most : (b + 1) * most] + np.arange(n)[:, None] for b, n in enumerate(counts)
        ]  # [n, F] for each sequence
        return Turned(
            self._stretch(np.repeat(rows, most).tolist(), runs, unit, slots),
            self._counts(starts),
            self._longs(np.concatenate(row_of)),
            self._longs(np.repeat([run.turn for run in runs], many)),
            self._longs(np.concatenate(places)),
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

    def _counts(self, numbers: Sequence[int] | np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)

    def _longs(self, numbers: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self._device)


def _split(layout: Layout) -> tuple[list[Run], int]:
    """The runs that stand alone, and the first slot of that which new tokens go on with."""
    runs = list(layout.runs)
    if runs and runs[-1].start + runs[-1].length == layout.end:
        return runs[:-1], runs.pop().start
    return runs, layout.end


def _nth(runs: Sequence[Run], index: int) -> Run:
    return runs[index] if index < len(runs) else Run(0, 0)
