"""One step of settled requests: new tokens go to pages of their own, and all that is held is attended to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvwise.kernels.base import Kernels, Marks, Sealed, Segment
from kvwise.methods.retention.base import Residual
from kvwise.tiers.arena import Arena


class Further(Protocol):
    """What each layer reads besides its pages, of the sequences of a part."""

    def segment(self, layer: int, queries: Tensor, keys: Tensor | None) -> Segment | None:
        """Rows for queries [B, Hq, D] with own keys [B, H, D], here by now; None: there are none."""
        ...

    def end(self, layer: int) -> None:
        """The layer has read them."""
        ...


@dataclass
class PagePart:
    """Settled sequences in pages of their own: tables int32 [L, B, H, N], lengths int32 [L, B, H].

    `slots` int64 [L, T, H] is where each head puts the new tokens (slots in page space): at the end, or where a victim
    was. `sealed`: each layer's packed pages. `residual`: what stands for tokens that have left, with the sequences'
    `index` int64 [B]. `marks`: what each layer notes in its column of mass instead of mass. `further`: what layers read
    besides their pages, in the same softmax.
    """

    rows: slice
    kernels: Kernels
    arena: Arena
    query_start: Tensor
    query_positions: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    index: Tensor
    mass: bool = False
    sealed: Sequence[Sealed] | None = None
    residual: Residual | None = None
    marks: Sequence[Marks] | None = None
    further: Further | None = None

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append (unless an earlier layer has stored for this one), then attend: all that is held is past."""
        owns = keys is not None and values is not None
        if keys is not None and values is not None:
            self.kernels.append(keys, values, self.arena.keys, self.arena.values, self.slots[layer])
        segment = Segment(
            self.arena.keys,
            self.arena.values,
            self.tables[layer],
            self.lengths[layer],
            positions=self.arena.columns["positions"] if window is not None and self._has_positions else None,
            mass=self.arena.columns["mass"] if self.mass and owns else None,
            sealed=None if self.sealed is None else self.sealed[layer],
            marks=None if self.marks is None else self.marks[layer],
        )
        more = None if self.further is None else self.further.segment(layer, queries, keys)
        segments = [segment] if more is None else [segment, more]
        found = self.kernels.attend(
            queries, self.query_start, segments, scale=scale, window=window, softcap=softcap,
            query_positions=self.query_positions if window is not None else None,
            want_lse=self.residual is not None,
        )  # fmt: skip
        if self.further is not None:
            self.further.end(layer)
        if self.residual is None:
            return found.out
        assert found.lse is not None
        return self.residual.merge(layer, self.index, queries, found.out, found.lse)

    @property
    def _has_positions(self) -> bool:
        return "positions" in self.arena.columns
