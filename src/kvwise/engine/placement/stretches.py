"""Stretches: the page tables and lengths under which a step's requests, laid out in runs, are attended to."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.strided_part import Stretch, Stretched
from kvwise.methods.retention.strided import Layout, Run

Key = tuple[object, ...]
MOST_KNOWN = 64  # tables held


class Stretches:
    """Builds stretches, and remembers them: once all slots are in use, only turns change from step to step."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device = device
        self._size = block_size
        self._known: dict[Key, Tensor] = {}
        self._last: tuple[Key, Stretched] | None = None

    def forget(self) -> None:
        """A row has other pages."""
        self._known.clear()
        self._last = None

    def of(
        self, rows: Sequence[int], layouts: Sequence[Layout], ends: Sequence[int], counts: Sequence[int], slots: Tensor
    ) -> Stretched:
        """How the rows' runs are attended to, with so many new tokens from slot `ends` on.

        slots: int64 [R, L, H, S] of every row.
        """
        key = tuple(
            (row, layout.end, end, n, *((run.start, run.length, run.turn == 0) for run in layout.runs))
            for row, layout, end, n in zip(rows, layouts, ends, counts, strict=True)
        )
        if self._last is None or self._last[0] != key:
            self._last = key, self._build(rows, layouts, ends, counts, slots)
        return replace(self._last[1], turns=self._turns(layouts, counts))

    def _build(
        self, rows: Sequence[int], layouts: Sequence[Layout], ends: Sequence[int], counts: Sequence[int], slots: Tensor
    ) -> Stretched:
        split = [_split(layout) for layout in layouts]
        opened = [Run(first, end - first + n) for (_, first), end, n in zip(split, ends, counts, strict=True)]
        others = _side_by_side([runs for runs, _ in split])
        unit = math.gcd(self._size, *(run.start for runs in (opened, *others) for run in runs))
        each = np.repeat(np.array(rows, np.int64), counts)
        place = np.concatenate([np.arange(end, end + n) for end, n in zip(ends, counts, strict=True)])
        new = slots[self._longs(each), ..., self._longs(place)].transpose(0, 1).contiguous()
        follow = self._stretch(rows, [opened], unit, slots)
        return Stretched(
            unit,
            self._counts([0, *np.cumsum(counts)]),
            new,
            Stretch(follow.tables[:, 0], follow.lengths[0]),
            self._stretch(rows, others, unit, slots) if others else None,
            None,
        )

    def _turns(self, layouts: Sequence[Layout], counts: Sequence[int]) -> Tensor | None:
        """Of the queries that meet runs that stand alone, int64 [F, T]; None: they meet all as they are."""
        turns = [[run.turn for run in runs] for runs in _side_by_side([_split(layout)[0] for layout in layouts])]
        return self._longs(np.repeat(np.array(turns, np.int64), counts, 1)) if any(map(any, turns)) else None

    def _stretch(self, rows: Sequence[int], runs: Sequence[Sequence[Run]], unit: int, slots: Tensor) -> Stretch:
        """Of runs [F][B]."""
        lengths = self._counts([[run.length for run in of] for of in runs])
        where = [[(row, run.start, -(-run.length // unit)) for row, run in zip(rows, of, strict=True)] for of in runs]
        key = unit, tuple(map(tuple, where))
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._tables(rows, runs, unit, slots)
        return Stretch(self._known[key], lengths[..., None].expand(-1, -1, slots.shape[2]).contiguous())

    def _tables(self, rows: Sequence[int], runs: Sequence[Sequence[Run]], unit: int, slots: Tensor) -> Tensor:
        """int32 [L, F, B, H, N]: pages of `unit` slots, 0 behind a run's last."""
        width = max(1, max(-(-run.length // unit) for of in runs for run in of))
        shape = slots.shape[1], len(runs), len(rows), slots.shape[2], width
        tables = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for f, of in enumerate(runs):
            for b, (row, run) in enumerate(zip(rows, of, strict=True)):
                found = slots[row, ..., run.start : run.start + run.length : unit] // unit
                tables[:, f, b, :, : found.shape[-1]] = found.to(torch.int32)
        return tables

    def _counts(self, numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)

    def _longs(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _split(layout: Layout) -> tuple[Sequence[Run], int]:
    """The runs that stand alone, and the first slot of that which new tokens go on with."""
    runs = layout.runs
    if runs and runs[-1].start + runs[-1].length == layout.end:
        return runs[:-1], runs[-1].start
    return runs, layout.end


def _side_by_side(runs: Sequence[Sequence[Run]]) -> list[list[Run]]:
    """Runs of B sequences as [F][B], empty ones where a sequence has fewer."""
    return [[of[i] if i < len(of) else Run(0, 0) for of in runs] for i in range(max(map(len, runs)))]
