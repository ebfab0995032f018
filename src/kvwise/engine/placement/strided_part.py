"""One step of requests that are read in strides: new tokens go behind what is kept, and all of it is attended to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.kernels.base import Kernels, Segment
from kvwise.models.rotation import Rotation
from kvwise.tiers.arena import Arena


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of slots of every sequence: tables int32 [L, B, H, N] of pages of `unit` slots, lengths int32 [B, H].

    Of F runs: tables [L, F, B, H, N], lengths [F, B, H].
    """

    tables: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Stretched:
    """Where the sequences of a step have their tokens: T new ones go to `slots` int64 [L, T, H].

    `open` are the runs that the new tokens follow. The keys of `others`, F runs, meet queries that turn by `turns`
    int64 [F, T] positions; None: as they are.
    """

    unit: int
    query_start: Tensor
    slots: Tensor
    open: Stretch
    others: Stretch | None
    turns: Tensor | None


class StridedPart:
    """Sequences laid out in runs of slots.

    `fading` float32 [T]: how much below 0 the log weight of a row's attention is in the mass; None: all weigh the same.
    """

    def __init__(
        self, rows: slice, kernels: Kernels, arena: Arena, stretched: Stretched, fading: Tensor | None,
        rotations: Sequence[Rotation],
    ) -> None:  # fmt: skip
        self.rows = rows
        self._kernels = kernels
        self._arena = arena
        unit = stretched.unit
        self._keys, self._values = (t.view(-1, unit, t.shape[-1]) for t in (arena.keys, arena.values))
        self._mass = arena.columns["mass"].view(-1, unit)
        self._at = stretched
        self._fading = fading
        self._rotations = rotations
        self._angles: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by the address of a rotation's frequencies

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append (unless an earlier layer has stored for this one), then attend; a window is longer than any text."""
        owns = keys is not None and values is not None
        if keys is not None and values is not None:
            self._kernels.append(keys, values, self._arena.keys, self._arena.values, self._at.slots[layer])
        mass = self._mass if owns else None
        segments = [self._segment(self._at.open, layer, mass, causal=True)]
        if self._at.others is not None:
            segments.append(self._segment(self._at.others, layer, mass, met=self._turn(layer, queries)))
        return self._kernels.attend(
            queries, self._at.query_start, segments, scale=scale, softcap=softcap, mass_fading=self._fading
        ).out

    def _segment(
        self, run: Stretch, layer: int, mass: Tensor | None, *, causal: bool = False, met: Tensor | None = None
    ) -> Segment:
        return Segment(self._keys, self._values, run.tables[layer], run.lengths, causal=causal, mass=mass, queries=met)

    def _turn(self, layer: int, queries: Tensor) -> Tensor | None:
        """Queries [T, Hq, D] as each of the other runs meets them: [F, T, Hq, D]; None: as they are."""
        turns = self._at.turns
        if turns is None:
            return None
        rotation = self._rotations[layer]
        if not len(rotation.inv_freq):
            return None
        known = rotation.inv_freq.data_ptr()
        if known not in self._angles:
            cos, sin, which = self._kernels.angles(turns, rotation.inv_freq)
            self._angles[known] = cos, sin, torch.repeat_interleave(which, queries.shape[1], 1)
        rows = queries.flatten(0, 1)
        turned = self._kernels.turn(rows, *self._angles[known], interleaved=rotation.interleaved)
        return turned.view(len(turns), *queries.shape)
