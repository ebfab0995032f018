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
    """A run of slots of every sequence: tables int32 [L, B, H, N] of pages of `unit` slots, lengths int32 [B, H]."""

    tables: Tensor
    lengths: Tensor


class StridedPart:
    """Sequences laid out in runs of slots; `slots` int64 [L, T, H] is where the new tokens go.

    `open` are the runs that the new tokens follow, `others` those that meet queries as they are. The keys of `turned`
    runs, F of them, meet queries that turn by `turns` int64 [F, T] positions. `fading` float32 [T]: what a row's log
    weight is below the last one's; None: all rows weigh the same.
    """

    def __init__(
        self, rows: slice, kernels: Kernels, arena: Arena, unit: int, query_start: Tensor, slots: Tensor, open: Stretch,
        others: Sequence[Stretch], turned: Sequence[Stretch], turns: Tensor, fading: Tensor | None,
        rotations: Sequence[Rotation],
    ) -> None:  # fmt: skip
        self.rows = rows
        self._kernels = kernels
        self._arena = arena
        self._keys, self._values = (t.view(-1, unit, t.shape[-1]) for t in (arena.keys, arena.values))
        self._mass = arena.columns["mass"].view(-1, unit)
        self._query_start = query_start
        self._slots = slots
        self._open = open
        self._others = others
        self._turned = turned
        self._turns = turns
        self._fading = fading
        self._rotations = rotations
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of a rotation's frequencies

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append (unless an earlier layer has stored for this one), then attend; a window is longer than any text."""
        owns = keys is not None and values is not None
        if keys is not None and values is not None:
            self._kernels.append(keys, values, self._arena.keys, self._arena.values, self._slots[layer])
        mass = self._mass if owns else None
        segments = [self._segment(self._open, layer, mass, causal=True)]
        segments += [self._segment(other, layer, mass) for other in self._others]
        if self._turned:
            met = self._turn(layer, queries)
            segments += [self._segment(run, layer, mass, met=to) for run, to in zip(self._turned, met, strict=True)]
        return self._kernels.attend(
            queries, self._query_start, segments, scale=scale, softcap=softcap, mass_fading=self._fading
        ).out

    def _segment(
        self, run: Stretch, layer: int, mass: Tensor | None, *, causal: bool = False, met: Tensor | None = None
    ) -> Segment:
        return Segment(self._keys, self._values, run.tables[layer], run.lengths, causal=causal, mass=mass, queries=met)

    def _turn(self, layer: int, queries: Tensor) -> Tensor:
        """Queries [T, Hq, D] as each turned run meets them: [F, T, Hq, D]."""
        rotation = self._rotations[layer]
        half = len(rotation.inv_freq)
        if not half:
            return queries.expand(len(self._turned), *queries.shape)
        known = rotation.inv_freq.data_ptr()
        if known not in self._angles:
            angles = self._turns.double()[..., None, None] * rotation.inv_freq
            self._angles[known] = (angles.cos().float(), angles.sin().float())
        cos, sin = self._angles[known]
        rotary = queries[..., : 2 * half].float()
        x, y = (rotary[..., 0::2], rotary[..., 1::2]) if rotation.interleaved else rotary.chunk(2, -1)
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), -1 if rotation.interleaved else -2).flatten(-2)
        rest = queries[..., 2 * half :].float().expand(len(self._turned), -1, -1, -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
