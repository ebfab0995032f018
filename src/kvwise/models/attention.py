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

from kvwise.core.layout import LayerMap
from kvwise.kernels.base import Kernels, Segment
from kvwise.tiers.arena import Arena


class Part(Protocol):
    """The sequences of a step that reach their KV in one way; `rows` is their slice of the flat batch."""

    rows: slice

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Store keys [T, H, D] and values, then answer queries [T, Hq, D] with [T, Hq, D].

        `layer` counts those that store KV. Without keys and values another layer of the model reads what this one
        has stored: nothing is appended, and what the keys receive there does not count.
        """
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

    `layers` says whose KV each layer of the model reads; parts and gates know the layers that store only. The module
    of a layer that reads another's still projects keys and values, as KVSharer's released code does: they are dropped.
    `gates`: called with each layer's number before the layer reads any KV; they wait for KV that is still on its way.
    """

    def __init__(self, parts: Sequence[Part], layers: LayerMap, gates: Sequence[Callable[[int], object]] = ()) -> None:
        self.parts = parts
        self._layers = layers
        self._gates = gates
        self.sound: Tensor | None = None
        self._last_layer = len(layers.reads) - 1

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Answer the queries of all parts: [T, Hq, D] in, [T, Hq, D] out."""
        stored, owns = self._layers.storage[layer], self._layers.stores(layer)
        for gate in self._gates if owns else ():
            gate(stored)
        outs = [
            part.attend(
                stored, queries[part.rows], keys[part.rows] if owns else None, values[part.rows] if owns else None,
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
    each key receives is added to the arena's mass column.
    """

    rows: slice
    kernels: Kernels
    arena: Arena
    query_start: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    mass: bool = False
    observer: Observer | None = None

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append, then attend causally over the block tables."""
        layout = self.arena.layout
        stride, offset = layout.pages_per_block, layout.page_offset(layer)
        if keys is not None and values is not None:
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
            mass=self.arena.columns["mass"] if self.mass and keys is not None else None,
        )
        if self.observer is not None and keys is not None:
            self.observer.observe(layer, queries, keys)
        found = self.kernels.attend(queries, self.query_start, [segment], scale=scale, window=window, softcap=softcap)
        return found.out
