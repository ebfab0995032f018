"""The hook's other side: where a step's queries, the kernels and the placements of KV meet, layer by layer.

A step is one flat row of tokens, cut into parts: sequences whose KV lies in whole blocks, in pages per layer and
head, or partly in another tier. Each part stores its new keys and values and answers its own queries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvwise.kernels.base import Kernels, Segment
from kvwise.tiers.arena import Arena


class Part(Protocol):
    """The sequences of a step that reach their KV in one way; `rows` is their slice of the flat batch."""

    rows: slice

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Store keys [T, H, D] and values, then answer queries [T, Hq, D] with [T, Hq, D]."""
        ...


class Observer(Protocol):
    """Someone who looks at the queries and keys of a prompt as they are computed (a selection method's index)."""

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """See queries [T, Hq, D] and rotated keys [T, H, D] of the whole part."""
        ...


class StepBatch:
    """What travels with one forward pass: `attend` is called once a layer by the hook in `models/hook.py`.

    `sound` bool [T], once the last layer has attended: whether a token's KV is made of finite numbers. What goes
    wrong in an earlier layer reaches the token's keys, values or answer in the last one through the residual stream.

    `gates`: called with each layer's number before the layer reads any KV; they wait for KV that is still on its way.
    """

    def __init__(self, parts: Sequence[Part], num_layers: int, gates: Sequence[Callable[[int], object]] = ()) -> None:
        self.parts = parts
        self._gates = gates
        self.sound: Tensor | None = None
        self._last_layer = num_layers - 1

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Answer the queries of all parts: [T, Hq, D] in, [T, Hq, D] out."""
        for gate in self._gates:
            gate(layer)
        outs = [
            part.attend(
                layer, queries[part.rows], keys[part.rows], values[part.rows],
                scale=scale, window=window, softcap=softcap,
            )
            for part in self.parts
        ]  # fmt: skip
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if layer == self._last_layer:
            sums = [t.sum((1, 2), dtype=torch.float32) for t in (keys, values, out)]
            self.sound = torch.stack(sums).isfinite().all(0)
        return out

    def look_ahead(self, layer: int, ask: "AskAhead") -> None:
        """The input of `layer` is known: parts that guess the next layer's queries may start now."""
        for part in self.parts:
            if isinstance(part, LooksAhead):
                part.look_ahead(layer, ask)


class AskAhead(Protocol):
    """Makes the query that a layer would make of the present hidden states."""

    def __call__(self, layer: int, rows: slice) -> Tensor:
        """Queries [T, Hq, D] of `layer` for the tokens in `rows`."""
        ...


class LooksAhead(ABC):
    """A part that wants to see the query of a layer before that layer runs."""

    @abstractmethod
    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """The input of `layer` is known; `ask(layer + 1, rows)` guesses the next layer's queries."""


@dataclass
class BlockPart:
    """Sequences in whole blocks: one int32 table [B, N] shared by all layers and heads.

    `slots` int64 [T] is where each new token goes (block * block_size + offset). With `mass`, the attention that
    each key receives is added to the arena's mass column: that of all rows, or of the last `mass_rows` int32 [B] of
    each line of the table. Neighbouring lines may be pieces of one sequence, of which some rows count and others not.
    """

    rows: slice
    kernels: Kernels
    arena: Arena
    query_start: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    mass: bool = False
    mass_rows: Tensor | None = None
    observer: Observer | None = None

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append, then attend causally over the block tables."""
        layout = self.arena.layout
        stride, offset = layout.pages_per_block, layout.page_offset(layer)
        self.kernels.append(
            keys,
            values,
            self.arena.keys,
            self.arena.values,
            self.slots,
            page_stride=stride,
            page_offset=offset,
        )
        segment = Segment(
            self.arena.keys,
            self.arena.values,
            self.tables,
            self.lengths,
            num_kv_heads=layout.num_kv_heads,
            page_stride=stride,
            page_offset=offset,
            mass=self.arena.columns["mass"] if self.mass else None,
        )
        if self.observer is not None:
            self.observer.observe(layer, queries, keys)
        found = self.kernels.attend(
            queries, self.query_start, [segment], scale=scale, window=window, softcap=softcap, mass_rows=self.mass_rows
        )
        return found.out


@dataclass
class PagePart:
    """Decoding sequences in pages of their own: tables int32 [L, B, H, N], lengths int32 [L, B, H].

    `slots` int64 [L, B, H] is where each head puts the new token (a slot in page space): at the end, or where a
    victim was.
    """

    rows: slice
    kernels: Kernels
    arena: Arena
    query_start: Tensor
    query_positions: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    mass: bool = False

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append, then attend to every slot in use: slot order is not position order, and all of it is past."""
        self.kernels.append(keys, values, self.arena.keys, self.arena.values, self.slots[layer])
        segment = Segment(
            self.arena.keys,
            self.arena.values,
            self.tables[layer],
            self.lengths[layer],
            causal=False,
            positions=self.arena.columns["positions"] if window is not None else None,
            mass=self.arena.columns["mass"] if self.mass else None,
        )
        found = self.kernels.attend(
            queries, self.query_start, [segment], scale=scale, window=window, softcap=softcap,
            query_positions=self.query_positions if window is not None else None,
        )  # fmt: skip
        return found.out
