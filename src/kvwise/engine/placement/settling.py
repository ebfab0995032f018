"""Settling: a method sees the KV of a finished prompt and says what stays; that moves together, the rest is freed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.compact import compact
from kvwise.engine.placement.observed import ObservedQueries, attention_rows
from kvwise.engine.placement.page_state import Counts
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels
from kvwise.methods.encoding.base import ChannelView
from kvwise.methods.retention.base import Kept, Merge, PromptView, Retention
from kvwise.models.loaded import LayerAttention
from kvwise.tiers.arena import Arena


@dataclass(frozen=True, slots=True)
class PromptKV:
    """The KV of a sequence that lies in whole blocks int64 [N], layer by layer."""

    arena: Arena
    kernels: Kernels
    blocks: Tensor
    num_tokens: int

    def keys(self, layer: int) -> Tensor:
        """float32 [H, T, D]."""
        return self._rows(self.arena.keys, layer).float()

    def values(self, layer: int) -> Tensor:
        """float32 [H, T, D]."""
        return self._rows(self.arena.values, layer).float()

    def mass(self) -> Tensor:
        """float32 [L, H, T]."""
        layout = self.arena.layout
        column = self.arena.by_block("mass")[self.blocks]  # [N, L * H, block_size]
        return column.transpose(0, 1).reshape(layout.num_layers, layout.num_kv_heads, -1)[..., : self.num_tokens]

    def _rows(self, arena: Tensor, layer: int) -> Tensor:
        layout = self.arena.layout
        size, num_heads = layout.block_size, layout.num_kv_heads
        tokens = torch.arange(self.num_tokens, device=self.blocks.device)
        page = self.blocks[tokens // size] * layout.pages_per_block + layout.page_offset(layer)
        slots = (page + torch.arange(num_heads, device=self.blocks.device)[:, None]) * size + tokens % size
        return self.kernels.gather(arena, slots.flatten()).view(num_heads, self.num_tokens, -1)


class Settler:
    """Asks a retention method about prompts and moves what it keeps. `layers` are the storing layers' facts."""

    def __init__(
        self, retention: Retention, arena: Arena, kernels: Kernels, layers: Sequence[LayerAttention],
        observed: ObservedQueries,
    ) -> None:  # fmt: skip
        self._retention = retention
        self._arena = arena
        self._kernels = kernels
        self._layers = layers
        self._observed = observed
        self._shape = (arena.layout.num_layers, arena.layout.num_kv_heads)

    def prompt(self, sequence: Seq, blocks: Tensor) -> PromptKV:
        """The KV of a sequence in these whole blocks int64 [N]."""
        return PromptKV(self._arena, self._kernels, blocks, sequence.num_computed)

    def ask(self, sequence: Seq, prompt: PromptKV) -> Kept:
        """What the method keeps, checked against its capacity."""
        num_tokens, num_prompt = sequence.num_computed, sequence.num_prompt
        device = prompt.blocks.device
        capacity = self._retention.capacity(num_prompt)
        view = PromptView(
            num_tokens,
            num_prompt,
            capacity,
            self._shape,
            torch.arange(num_tokens, dtype=torch.int32, device=device),
            prompt.mass() if self._retention.needs_mass else None,
            self._rows_of(sequence, prompt),
            prompt.keys,
            prompt.values,
            sequence.image_spans,
        )
        kept = self._retention.keep(view)
        self._check(kept, num_tokens, num_prompt, capacity)
        return kept

    def _rows_of(self, sequence: Seq, prompt: PromptKV) -> Callable[[int], Tensor]:
        num_prompt = sequence.num_prompt
        num_rows = min(num_prompt, self._retention.observed_rows(num_prompt, sequence.image_spans))

        def rows(layer: int) -> Tensor:
            queries = self._observed.queries(sequence, layer, num_rows)
            return attention_rows(queries, prompt.keys(layer), num_prompt - num_rows, self._layers[layer])

        return rows

    def channel_view(self, sequence: Seq, prompt: PromptKV, num_rows: int) -> ChannelView:
        """What an encoding sees of the prompt."""
        num_heads = self._shape[1]

        def queries(layer: int) -> Tensor:
            found = self._observed.queries(sequence, layer, min(num_rows, sequence.num_prompt))
            return found.view(found.shape[0], num_heads, -1, found.shape[-1]).permute(1, 2, 0, 3)

        return ChannelView(self._shape, queries, prompt.keys)

    def _check(self, kept: Kept, num_tokens: int, num_prompt: int, capacity: int | None) -> None:
        shape, name = (*self._shape, num_tokens), self._retention.name
        if kept.mask.shape != shape or kept.mask.dtype is not torch.bool:
            raise ValueError(f"{name} told what stays as {tuple(kept.mask.shape)} {kept.mask.dtype}, not bool {shape}")
        counts = kept.mask.sum(-1)
        if int(counts.min()) < 1:
            raise ValueError(f"{name} kept nothing of {num_tokens} tokens in a layer and head: at least one must stay")
        if capacity is None:
            return
        allowed = max(0, capacity + (num_tokens - num_prompt if self._retention.grows else 0)) * counts.numel()
        if int(counts.sum()) > allowed:
            raise ValueError(
                f"{name} kept {int(counts.sum())} of {num_tokens} tokens in {counts.numel()} heads; "
                f"at most {allowed} may stay in all of them together"
            )

    # -- moving -------------------------------------------------------------------------------------------------

    def move(self, kept: Kept, prompt: PromptKV, tables: Tensor) -> None:
        """Move what stays to the front of its pages int32 [L, H, N], mixed with what lives on in it."""
        merged = [] if kept.merge is None else [self._merged(layer, kept.merge, prompt) for layer in self._all_layers]
        compact(self._arena, self._kernels, kept.mask, prompt.blocks, tables)
        for number, rows in enumerate(merged):
            self._write_merged(kept, number, rows, tables)
        if kept.mass is not None:
            layer, head, token = kept.mask.nonzero(as_tuple=True)
            slots = self._slots(kept, tables, (layer, head, token))
            self._arena.columns["mass"].view(-1)[slots] = kept.mass[layer, head, token].float()

    @property
    def _all_layers(self) -> range:
        return range(self._shape[0])

    def _merged(self, layer: int, merge: Merge, prompt: PromptKV) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, D] of a layer, each token with what was merged into it."""
        target = merge.target[layer][..., None]
        sides = []
        for rows, weights in (
            (prompt.keys(layer), merge.key_weights[layer]),
            (prompt.values(layer), merge.value_weights[layer]),
        ):
            mixed = torch.zeros_like(rows)
            mixed.scatter_add_(1, target.expand_as(rows), rows * weights[..., None])
            sides.append(mixed)
        return sides[0], sides[1]

    def _write_merged(self, kept: Kept, layer: int, rows: tuple[Tensor, Tensor], tables: Tensor) -> None:
        head, token = kept.mask[layer].nonzero(as_tuple=True)
        slots = self._slots(kept, tables, (torch.full_like(head, layer), head, token))
        for mixed, arena in zip(rows, (self._arena.keys, self._arena.values), strict=True):
            self._kernels.scatter(mixed[head, token], arena, slots)

    def _slots(self, kept: Kept, tables: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Slots of kept (layer, head, token) places, once they have moved."""
        size = self._arena.layout.block_size
        layer, head, _ = places
        rank = (kept.mask.cumsum(-1) - 1)[places]
        return tables[layer, head, rank // size].long() * size + rank % size


def counts_of(mask: Tensor) -> Counts:
    """Tokens that stay, int32 [L, H]."""
    counts: Counts = mask.sum(-1).cpu().numpy().astype(np.int32)
    return counts
