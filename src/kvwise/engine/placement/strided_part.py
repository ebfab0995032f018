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


@dataclass(frozen=True, slots=True)
class Turned:
    """Runs whose keys meet turned queries: each is a sequence of its own, with the queries `row_of` int64 [T'].

    `turn` int64 [T'] is by how many positions. `places` int64 [T, F] are the rows in T' that answer each query;
    `start` int32 [B' + 1] cuts T' into the runs.
    """

    runs: Stretch
    start: Tensor
    row_of: Tensor
    turn: Tensor
    places: Tensor


class StridedPart:
    """Sequences laid out in runs of slots; `slots` int64 [L, T, H] is where the new tokens go.

    `open` are the runs that the new tokens follow, `others` those that meet queries as they are, `turned` the rest.
    `fading` float32 [T], what a row's log weight is below the last one's; None: all rows weigh the same.
    """

    def __init__(
        self, rows: slice, kernels: Kernels, arena: Arena, unit: int, query_start: Tensor, slots: Tensor, open: Stretch,
        others: Sequence[Stretch], turned: Turned | None, fading: Tensor | None, rotations: Sequence[Rotation],
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
        at_once = self._turned is None and self._fading is None
        near = [self._segment(self._open, layer, causal=True, mass=owns and at_once)]
        near += [self._segment(other, layer, causal=False, mass=owns and at_once) for other in self._others]
        found = self._kernels.attend(
            queries, self._query_start, near, scale=scale, softcap=softcap, want_lse=not at_once
        )
        if at_once:
            return found.out
        out, lse = found.out, found.lse
        assert lse is not None
        if self._turned is not None:
            met = self._turn(layer, queries[self._turned.row_of])
            far = self._segment(self._turned.runs, layer, causal=False)
            rest = self._kernels.attend(met, self._turned.start, [far], scale=scale, softcap=softcap, want_lse=True)
            assert rest.lse is not None
            out, lse = _merge(out, lse, rest.out[self._turned.places], rest.lse[self._turned.places])
        if owns:
            weighed = lse if self._fading is None else lse + self._fading[:, None]
            self._add_mass(layer, queries, self._query_start, self._open, weighed, scale, softcap, causal=True)
            for other in self._others:
                self._add_mass(layer, queries, self._query_start, other, weighed, scale, softcap)
            if self._turned is not None:
                weighed = weighed[self._turned.row_of]
                self._add_mass(layer, met, self._turned.start, self._turned.runs, weighed, scale, softcap)
        return out

    def _add_mass(
        self, layer: int, queries: Tensor, start: Tensor, runs: Stretch, lse: Tensor, scale: float,
        softcap: float | None, *, causal: bool = False,
    ) -> None:  # fmt: skip
        segment = self._segment(runs, layer, causal=causal, mass=True)
        self._kernels.add_mass(queries, start, [segment], lse, scale=scale, softcap=softcap)

    def _segment(self, runs: Stretch, layer: int, *, causal: bool, mass: bool = False) -> Segment:
        return Segment(
            self._keys, self._values, runs.tables[layer], runs.lengths, causal=causal, mass=self._mass if mass else None
        )

    def _turn(self, layer: int, queries: Tensor) -> Tensor:
        """Queries [T', Hq, D], each turned by its run's number of positions."""
        assert self._turned is not None
        rotation = self._rotations[layer]
        half = len(rotation.inv_freq)
        if not half:
            return queries
        known = rotation.inv_freq.data_ptr()
        if known not in self._angles:
            angles = self._turned.turn.double()[:, None, None] * rotation.inv_freq
            self._angles[known] = (angles.cos().float(), angles.sin().float())
        cos, sin = self._angles[known]
        rotary = queries[..., : 2 * half].float()
        x, y = (rotary[..., 0::2], rotary[..., 1::2]) if rotation.interleaved else rotary.chunk(2, -1)
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), -1 if rotation.interleaved else -2)
        return torch.cat((turned.flatten(-2).to(queries.dtype), queries[..., 2 * half :]), -1)


def _merge(out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over what was answered apart: [T, Hq, D] and [T, Hq] with [T, F, Hq, D] and [T, F, Hq]."""
    total = torch.logaddexp(lse, lses.logsumexp(1))
    merged = out * (lse - total).exp()[..., None].to(out.dtype)
    merged += (outs * (lses - total[:, None]).exp()[..., None].to(outs.dtype)).sum(1)
    return merged, total
