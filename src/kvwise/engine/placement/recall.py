"""Recall: a request's KV moves to host memory after prefill; each layer fetches the tokens a selection method names."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.compact import compact
from kvwise.engine.placement.recall_part import RecallPart
from kvwise.engine.placement.staging import Staging
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels
from kvwise.methods.selection.base import Index, Selection
from kvwise.models.attention import Observer
from kvwise.tiers.arena import Arena
from kvwise.tiers.link import Link


@dataclass(slots=True)
class _Held:
    """What this placement holds for one sequence: its row in the host's cache, and stores that are under way."""

    host_row: int
    num_stored: int = 0  # tokens whose copy to the host has begun
    stores: list[Future[None]] = field(default_factory=list)
    tables: Tensor | None = None  # int32 [F, H, N]: device pages of the layers that stay, once settled


class RecallPlacement:
    """Carries out a selection method over two tiers.

    During prefill a request lies in device blocks and is copied to the host behind the computation. When prefill ends,
    only the first `num_full_layers` layers stay on the device; the pages of all others return to the pool.
    """

    settles = True
    wants_mass = False
    looks_ahead = True
    forks = False

    def __init__(
        self,
        selection: Selection,
        index: Index,
        cache: CacheManager,
        arena: Arena,
        host_cache: CacheManager,
        host: Arena,
        kernels: Kernels,
        host_kernels: Kernels,
        fetch_link: Link,
        store_link: Link,
        scales: Sequence[float],
        audit: bool = False,
    ) -> None:
        self.selection = selection
        self.index = index
        self.arena = arena
        self.host = host
        self.kernels = kernels
        self.host_kernels = host_kernels
        self._staging_kernels = host_kernels if arena.keys.device.type == "cpu" else kernels
        self.scales = scales  # factor on the dot products of each layer
        self.audit = audit
        self._cache = cache
        self._host_cache = host_cache
        self._fetch_link = fetch_link
        self._store_link = store_link
        self._held: dict[Seq, _Held] = {}
        self.failures: dict[Seq, Exception] = {}  # what the index raised in this step, by request
        layout = arena.layout
        # Two buffers, used by turns: one is read by the layer that runs while the next layer's rows arrive.
        self._staging = [Staging(layout, arena.keys.dtype, arena.keys.device) for _ in range(2)]

    # -- admission ----------------------------------------------------------------------------------------------

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The host must hold all tokens of a request, and the device those of the full layers."""
        layout = self.arena.layout
        have = self.host.num_blocks * layout.block_size
        if num_tokens > have:
            return (
                f"prompt of {num_prompt} tokens and its output need {num_tokens} tokens of host KV and the host tier "
                f"holds {have}: raise kv_offloading_bytes, or lower max_tokens"
            )
        if int(self._num_pages(num_tokens).sum()) > self.arena.num_blocks * layout.pages_per_block:
            return (
                f"prompt of {num_prompt} tokens and its output need {num_tokens} tokens of device KV in "
                f"{self.selection.num_full_layers} of {layout.num_layers} layers, more than the pool holds: "
                "raise kv_cache_memory_bytes, or lower max_tokens"
            )
        return None

    def admit(self, sequence: Seq) -> bool:
        """Have a row in the host's cache with room for the prompt and its first token."""
        keys = self._host_cache.keys(np.empty(0, dtype=np.int64))
        row = self._host_cache.admit(self._host_cache.match(keys, 1), keys, 1)
        if not self._host_cache.reserve(row, len(sequence.tokens) + 1):
            self._host_cache.release(row)
            return False
        self._held[sequence] = _Held(row)
        return True

    # -- prefill ------------------------------------------------------------------------------------------------

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """The index sees each sequence's share of the flat batch."""
        return _PromptObserver(self, prefills) if prefills else None

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Begin to copy the blocks that have become full to the host."""
        for sequence, _ in prefills:
            size = self.arena.layout.block_size
            self._begin_store(sequence, sequence.num_computed // size * size)
        return self._failed()

    def _failed(self) -> list[Failure]:
        failed = list(self.failures.items())
        self.failures.clear()
        return failed

    def _begin_store(self, sequence: Seq, until: int) -> None:
        """Copy the blocks that hold tokens `num_stored` to `until` to the host, all layers but the full ones."""
        held = self._held[sequence]
        size = self.arena.layout.block_size
        first, last = held.num_stored // size, -(-until // size)
        if last <= first:
            return
        assert sequence.row is not None
        source = self._pages(self._cache.tables[sequence.row, first:last])
        target = self._pages(self._host_cache.tables[held.host_row, first:last])
        num_bytes = source.numel() * self.arena.layout.page_bytes
        held.stores.append(self._store_link.begin(lambda: self._copy_to_host(source, target), num_bytes))
        held.num_stored = until

    def _pages(self, blocks: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        """Pages of these blocks, all layers but the full ones, in one order for both arenas."""
        layout = self.arena.layout
        first = self.selection.num_full_layers * layout.num_kv_heads
        inside = torch.arange(first, layout.pages_per_block)
        return (torch.from_numpy(blocks.astype(np.int64))[:, None] * layout.pages_per_block + inside).flatten()

    def _copy_to_host(self, source: Tensor, target: Tensor) -> None:
        for device, host in ((self.arena.keys, self.host.keys), (self.arena.values, self.host.values)):
            if device.device == host.device:
                self.host_kernels.copy_pages(device, source, host, target)
            else:
                host[target] = device[source.to(device.device)].to(host.device)

    # -- settle -------------------------------------------------------------------------------------------------

    def settle(self, sequence: Seq) -> bool:
        """Finish the copy to the host, index the keys, and keep only the full layers on the device."""
        self._begin_store(sequence, sequence.num_computed)
        for store in self._held[sequence].stores:
            store.result()
        assert sequence.row is not None
        num_tokens = sequence.num_computed
        blocks = torch.from_numpy(self._cache.tables[sequence.row].astype(np.int64)).to(self.arena.keys.device)
        self._build_index(sequence.row, blocks, num_tokens)
        pages = self._cache.paginate(sequence.row, self._num_pages(num_tokens + 1))
        if pages is None:
            return False
        tables = torch.from_numpy(pages).to(self.arena.keys.device)
        compact(self.arena, self.kernels, self._stays(num_tokens), blocks, tables)
        self._cache.finish_paginate(sequence.row)
        self._held[sequence].tables = tables[: self.selection.num_full_layers]
        freed = self._cache_pages(num_tokens) - int(self._num_pages(num_tokens + 1).sum())
        sequence.attestation.bytes_freed += max(0, freed) * self.arena.layout.page_bytes
        return True

    def _cache_pages(self, num_tokens: int) -> int:
        layout = self.arena.layout
        return layout.num_blocks_for(num_tokens) * layout.pages_per_block

    def _num_pages(self, num_tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Device pages [L, H] for `num_tokens` tokens: the full layers' only."""
        layout = self.arena.layout
        pages = np.zeros((layout.num_layers, layout.num_kv_heads), dtype=np.int64)
        pages[: self.selection.num_full_layers] = layout.num_blocks_for(num_tokens)
        return pages

    def _stays(self, num_tokens: int) -> Tensor:
        layout = self.arena.layout
        kept = torch.zeros((layout.num_layers, layout.num_kv_heads, num_tokens), dtype=torch.bool)
        kept[: self.selection.num_full_layers] = True
        return kept.to(self.arena.keys.device)

    def _build_index(self, row: int, blocks: Tensor, num_tokens: int) -> None:
        layout = self.arena.layout
        tokens = torch.arange(num_tokens, device=blocks.device)
        size = layout.block_size
        heads = torch.arange(layout.num_kv_heads, device=blocks.device)
        for layer in range(self.selection.num_full_layers, layout.num_layers):
            page = blocks[tokens // size] * layout.pages_per_block + layout.page_offset(layer)
            slots = (page[:, None] + heads) * size + (tokens % size)[:, None]
            keys = self.kernels.gather(self.arena.keys, slots.flatten())
            self.index.build(layer, row, keys.view(num_tokens, layout.num_kv_heads, -1))

    # -- decoding -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Seq) -> bool:
        """Room for one more token, on the host and in the device pages of the full layers."""
        held = self._held[sequence]
        num_tokens = len(sequence.tokens)
        if not self._host_cache.reserve(held.host_row, num_tokens):
            return False
        assert sequence.row is not None and held.tables is not None
        if num_tokens <= held.tables.shape[-1] * self.arena.layout.block_size:
            return True
        pages = self._cache.grow_pages(sequence.row, self._num_pages(num_tokens))
        if pages is None:
            return False
        tables = torch.from_numpy(pages).to(self.arena.keys.device)
        held.tables = tables[: self.selection.num_full_layers]
        return True

    def part(self, sequences: Sequence[Seq], rows: slice) -> RecallPart:
        """One new token for each of these sequences."""
        return RecallPart(self, sequences, rows)

    def device_tables(self, sequences: Sequence[Seq]) -> Tensor:
        """Page tables int32 [F, B, H, N] of the full layers, padded to the longest."""
        tables = [self._tables(s) for s in sequences]
        longest = max(t.shape[-1] for t in tables)
        padded = [torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in tables]
        return torch.stack(padded, dim=1)

    def _tables(self, sequence: Seq) -> Tensor:
        tables = self._held[sequence].tables
        assert tables is not None
        return tables

    def host_blocks(self, sequence: Seq) -> Tensor:
        """The sequence's block table on the host, int64 [N]."""
        row = self._held[sequence].host_row
        return torch.from_numpy(self._host_cache.tables[row].astype(np.int64))

    def begin_fetch(self, layer: int, slots: Tensor, target: Tensor, shape: tuple[int, int]) -> "Future[Staging]":
        """Bring rows at host slots int64 [n] to staging slots [n] of a buffer [B, rows per head], over the link."""
        staging = self._staging[layer % 2]
        num_bytes = 2 * slots.numel() * self.host.layout.head_dim * self.host.keys.element_size()

        def transfer() -> Staging:
            staging.resize(*shape)
            for host, device in ((self.host.keys, staging.keys), (self.host.values, staging.values)):
                rows = self.host_kernels.gather(host, slots)
                self._staging_kernels.scatter(rows.to(device.device), device, target)
            return staging

        return self._fetch_link.begin(transfer, num_bytes)

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Nothing to do: new tokens were stored layer by layer."""
        return self._failed()

    # -- the rest -----------------------------------------------------------------------------------------------

    def release(self, sequence: Seq) -> None:
        """Wait for stores that still read the sequence's device blocks, then forget it on the host."""
        if sequence.row is not None:
            self.index.drop(sequence.row)
        held = self._held.pop(sequence, None)
        if held is not None:
            wait(held.stores)  # not result(): a copy that failed must not keep the request's memory
            self._host_cache.release(held.host_row)

    def kv_bytes(self) -> Mapping[str, int]:
        """Host blocks in use, and on the device the index and the staging buffers."""
        usage = self._host_cache.usage()
        staged = sum(s.num_bytes for s in self._staging)
        return {
            "host": usage.num_referenced * self.host.layout.block_bytes,
            "device": self.index.num_bytes + staged,
        }

    def links(self) -> Mapping[str, str]:
        """Labels of both directions."""
        return {link.name: link.label for link in (self._fetch_link, self._store_link)}

    def close(self) -> None:
        """End the links' threads."""
        self._fetch_link.close()
        self._store_link.close()


class _PromptObserver:
    """Hands each sequence's rows of the flat batch to the index."""

    def __init__(self, placement: RecallPlacement, prefills: Sequence[tuple[Seq, int]]) -> None:
        self._placement = placement
        self._prefills = prefills

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Cut the flat batch into sequences."""
        if layer < self._placement.selection.num_full_layers:
            return
        start = 0
        for sequence, num_tokens in self._prefills:
            assert sequence.row is not None
            rows = slice(start, start + num_tokens)
            try:
                self._placement.index.observe(layer, sequence.row, queries[rows], keys[rows])
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._placement.failures.setdefault(sequence, error)
            start += num_tokens
