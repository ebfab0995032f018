"""Recall: a request's KV moves to host memory after prefill; each layer fetches the tokens a selection method names."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.core.output import HeadReport
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.compact import compact
from kvwise.engine.placement.host_pool import HostPool
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.recall_fetch import Recall
from kvwise.engine.placement.recall_part import AheadPart, RecallPart
from kvwise.engine.placement.recall_reader import PromptObserver
from kvwise.engine.sequence import Sequence as Seq
from kvwise.models.attention import Observer

Blocks = np.ndarray[tuple[int], np.dtype[np.int32]] | np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(slots=True)
class _Held:
    """What this placement holds for one sequence: its rows on the host, and stores that are under way."""

    rows: HostRows
    num_stored: int = 0  # tokens whose copy to the host has begun
    stores: list[Future[None]] = field(default_factory=list)
    indexed: bool = False  # whether the index has been built, and the host's rows put in its order
    tables: Tensor | None = None  # int32 [F, H, N]: device pages of the layers that stay, once settled


class RecallPlacement:
    """Carries out a selection method over two tiers.

    During prefill a request lies in device blocks and is copied to the host behind the computation. When prefill ends,
    only the first `num_full_layers` layers stay on the device; the pages of all others return to the pool.
    """

    settles = True
    wants_mass = False

    def __init__(self, recall: Recall, cache: CacheManager, host: HostPool) -> None:
        self.index = recall.index
        self.looks_ahead = recall.selection.looks_ahead
        self._recall = recall
        self._tiers = recall.tiers
        self._layout = recall.tiers.layout
        self._num_full_layers = recall.num_full_layers
        self._device = recall.tiers.device.keys.device
        self._cache = cache
        self._host = host
        self._held: dict[Seq, _Held] = {}

    def observed_rows(self, sequence: Seq) -> int:
        """None."""
        return 0

    # -- admission ----------------------------------------------------------------------------------------------

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The host must hold all tokens of a request, and the device those of the full layers."""
        layout = self._layout
        if refusal := self._host.refusal(num_tokens):
            return f"prompt of {num_prompt} tokens and its output {refusal}"
        if int(self._num_pages(num_tokens).sum()) > self._tiers.device.num_blocks * layout.pages_per_block:
            return (
                f"prompt of {num_prompt} tokens and its output need {num_tokens} tokens of device KV in "
                f"{self._num_full_layers} of {layout.num_layers} layers, more than the pool holds: "
                "raise kv_cache_memory_bytes, or lower max_tokens"
            )
        return None

    def admit(self, sequence: Seq) -> bool:
        """Have room on the host for the prompt and its first token."""
        rows = self._host.open(len(sequence.tokens) + 1)
        if rows is not None:
            self._held[sequence] = _Held(rows)
        return rows is not None

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Room on the host and what the index has seen of the prompt; each fork settles by itself."""
        if not self.admit(sibling):
            return False
        self._recall.fork(source, sibling)
        return True

    # -- prefill ------------------------------------------------------------------------------------------------

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """The index sees each sequence's share of the flat batch."""
        return PromptObserver(self._recall, prefills) if prefills else None

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Begin to copy the blocks that have become full to the host."""
        for sequence, _ in prefills:
            size = self._layout.block_size
            self._begin_store(sequence, sequence.num_computed // size * size)
        return self._recall.failed()

    def _begin_store(self, sequence: Seq, until: int) -> None:
        """Copy the blocks that hold tokens `num_stored` to `until` to the host, all layers but the full ones."""
        held = self._held[sequence]
        size = self._layout.block_size
        first, last = held.num_stored // size, -(-until // size)
        if last <= first:
            return
        assert sequence.row is not None
        source = self._pages(self._cache.tables[sequence.row, first:last])
        target = self._pages(held.rows.blocks[first:last])
        held.stores.append(self._tiers.begin_store(source, target))
        held.num_stored = until

    def _pages(self, blocks: Blocks) -> Tensor:
        """Pages of these blocks, all layers but the full ones, in one order for both arenas."""
        inside = torch.arange(self._layout.page_offset(self._num_full_layers), self._layout.pages_per_block)
        return (_int64(blocks)[:, None] * self._layout.pages_per_block + inside).flatten()

    # -- settle -------------------------------------------------------------------------------------------------

    def settle(self, sequence: Seq) -> bool:
        """Finish the copy to the host, index the keys, and keep only the full layers on the device."""
        if sequence in self._recall.failures:
            raise self._recall.failures.pop(sequence)
        self._begin_store(sequence, sequence.num_computed)
        held = self._held[sequence]
        for store in held.stores:
            store.result()
        assert sequence.row is not None
        num_tokens = sequence.num_computed
        blocks = _int64(self._cache.tables[sequence.row]).to(self._device)
        if not held.indexed:
            self._build_index(sequence.row, blocks, num_tokens, held)
        num_pages = self._num_pages(num_tokens + 1)
        pages = self._cache.paginate(sequence.row, num_pages)
        if pages is None:
            return False
        tables = torch.from_numpy(pages).to(self._device)
        compact(self._tiers.device, self._tiers.kernels, self._stays(num_tokens), blocks, tables)
        self._cache.finish_paginate(sequence.row)
        held.tables = tables[: self._num_full_layers]
        freed = self._layout.num_blocks_for(num_tokens) * self._layout.pages_per_block - int(num_pages.sum())
        sequence.attestation.bytes_freed += max(0, freed) * self._layout.page_bytes
        return True

    def _num_pages(self, num_tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Device pages [L, H] for `num_tokens` tokens: the full layers' only."""
        pages = np.zeros((self._layout.num_layers, self._layout.num_kv_heads), dtype=np.int64)
        pages[: self._num_full_layers] = self._layout.num_blocks_for(num_tokens)
        return pages

    def _stays(self, num_tokens: int) -> Tensor:
        kept = torch.zeros((self._layout.num_layers, self._layout.num_kv_heads, num_tokens), dtype=torch.bool)
        kept[: self._num_full_layers] = True
        return kept.to(self._device)

    def _build_index(self, row: int, blocks: Tensor, num_tokens: int, held: _Held) -> None:
        for layer in range(self._num_full_layers, self._layout.num_layers):
            self.index.build(layer, row, self._tiers.device_keys(layer, blocks, num_tokens).transpose(0, 1))
            self._recall.follow_order(layer, row, held.rows)
        held.indexed = True

    # -- decoding -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Seq) -> bool:
        """Room for one more token, on the host and in the device pages of the full layers."""
        held = self._held[sequence]
        num_tokens = len(sequence.tokens)
        if not self._host.reserve(held.rows, num_tokens):
            return False
        assert sequence.row is not None and held.tables is not None
        if not self._num_full_layers or num_tokens <= held.tables.shape[-1] * self._layout.block_size:
            return True
        pages = self._cache.grow_pages(sequence.row, self._num_pages(num_tokens))
        if pages is None:
            return False
        held.tables = torch.from_numpy(pages).to(self._device)[: self._num_full_layers]
        return True

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> RecallPart:
        """One new token for each of these sequences."""
        held = [self._held[s] for s in sequences]
        kind = AheadPart if self.looks_ahead else RecallPart
        return kind(self._recall, sequences, rows, [h.rows for h in held], _side_by_side([h.tables for h in held]))

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Nothing to do: new tokens were stored layer by layer."""
        return self._recall.failed()

    # -- the rest -----------------------------------------------------------------------------------------------

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """The full layers hold all tokens on the device; what the others read came from the host."""
        every, read = list(range(sequence.num_computed)), self._held[sequence].rows.read
        nothing: list[list[int]] = [[]] * self._layout.num_kv_heads
        return [
            [
                HeadReport(every if layer < self._num_full_layers else [], recalled=sorted(rows))
                for rows in (read[layer].tolist() if layer in read else nothing)
            ]
            for layer in range(self._layout.num_layers)
        ]

    def release(self, sequence: Seq) -> None:
        """Wait for transfers that still read or write what the sequence holds, then forget it on both sides."""
        if sequence.row is not None:
            self.index.drop(sequence.row)
        held = self._held.pop(sequence, None)
        if held is not None:
            wait(held.stores)  # not result(): a copy that failed must not keep the request's memory
            self._tiers.finish_fetches()
            self._host.close(held.rows)
        if not self._held:
            self._tiers.staging.clear()
        self._recall.failures.pop(sequence, None)

    def kv_bytes(self) -> Mapping[str, int]:
        """Host blocks in use, and on the device the index and the staging pages."""
        return {
            "host": self._host.num_bytes,
            "device": self.index.num_bytes + self._tiers.staged_bytes,
        }

    def links(self) -> Mapping[str, str]:
        """Labels of both directions."""
        return self._tiers.links()

    def close(self) -> None:
        """End the links' threads."""
        self._tiers.close()


def _int64(blocks: Blocks) -> Tensor:
    return torch.from_numpy(blocks.astype(np.int64))


def _side_by_side(tables: Sequence[Tensor | None]) -> Tensor:
    """Page tables [F, H, N] of several sequences as int32 [F, B, H, N], padded to the longest."""
    settled = [t for t in tables if t is not None]
    longest = max(t.shape[-1] for t in settled)
    return torch.stack([torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in settled], dim=1)
