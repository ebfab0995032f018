"""Pages per layer and head: after prefill only the kept tokens stay, and while decoding a victim makes room."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.compact import compact, slots_of
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels
from kvwise.methods.retention.base import DecodeView, PromptView, Retention
from kvwise.models.attention import Observer, PagePart
from kvwise.tiers.arena import Arena


class PagePlacement:
    """Carries out a retention method.

    A request has the pages of its capacity for good, or, where the method lets the cache grow, one more whenever its
    output has filled the last. State is batched over the cache manager's rows R: page tables int32 [R, L, H, N],
    `used` slots int32 [R, L, H] and `write` int32 [R, L, H], the slot index where the next token goes: at the end, or
    where the victim was.
    """

    settles = True
    looks_ahead = False

    def __init__(
        self, retention: Retention, cache: CacheManager, arena: Arena, kernels: Kernels, max_rows: int
    ) -> None:
        self._retention = retention
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self.wants_mass = retention.needs_mass
        self._ranks_victims = retention.needs_mass and not retention.grows  # while decoding, by mass
        layout = arena.layout
        self._shape = (layout.num_layers, layout.num_kv_heads)
        self._device = arena.keys.device
        self._tables = torch.zeros((max_rows, *self._shape, 1), dtype=torch.int32, device=self._device)
        self._used = torch.zeros((max_rows, *self._shape), dtype=torch.int32, device=self._device)
        self._write = torch.zeros_like(self._used)
        self._capacity = torch.zeros(max_rows, dtype=torch.int32, device=self._device)
        self._pages_held = np.zeros(max_rows, dtype=np.int64)  # by each head of a row

    def observed_rows(self, num_prompt: int) -> int | None:
        """As the method says."""
        return self._retention.observed_rows(num_prompt)

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The pool must hold all a head may ever keep, and the token being added (a window can outgrow the prompt)."""
        layout = self._arena.layout
        most = self._most(num_prompt, num_tokens)
        if layout.num_blocks_for(most) <= self._arena.num_blocks:
            return None
        return (
            f"{self._retention} keeps up to {most} tokens of a prompt of {num_prompt} tokens and its output, and the "
            f"pool holds {self._arena.num_blocks * layout.block_size}: raise kv_cache_memory_bytes or keep fewer"
        )

    def _most(self, num_prompt: int, num_tokens: int) -> int:
        """Slots a head of a request of `num_prompt` tokens that may grow to `num_tokens` can need at once."""
        capacity = self._retention.capacity(num_prompt)
        assert capacity is not None
        if self._retention.grows:
            return min(capacity, num_prompt) + num_tokens - num_prompt
        return min(capacity, num_tokens) + 1

    def admit(self, sequence: Seq) -> bool:
        """Nothing is needed outside the pool."""
        return True

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Nothing is held outside the pool: masses are forked with the blocks they lie beside."""
        return True

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Nobody looks: the mass column sees every row."""
        return None

    # -- after prefill ------------------------------------------------------------------------------------------

    def settle(self, sequence: Seq) -> bool:
        """Keep what the method keeps: move those slots together and free every other page."""
        assert sequence.row is not None
        num_tokens = sequence.num_computed
        blocks = self._block_table(sequence.row, num_tokens)
        kept = self._kept(blocks, sequence)
        num_pages = self._num_pages(sequence)
        pages = self._cache.paginate(sequence.row, self._each_head(num_pages))
        if pages is None:
            return False
        tables = torch.from_numpy(pages).to(self._device)
        compact(self._arena, self._kernels, kept, blocks, tables)
        self._cache.finish_paginate(sequence.row)
        counts = kept.sum(-1)
        self._remember(sequence, tables, counts)
        self._attest(sequence, num_tokens, counts, tables)
        return True

    def _block_table(self, row: int, num_tokens: int) -> Tensor:
        num_blocks = self._arena.layout.num_blocks_for(num_tokens)
        return torch.from_numpy(self._cache.tables[row, :num_blocks].astype(np.int64)).to(self._device)

    def _kept(self, blocks: Tensor, sequence: Seq) -> Tensor:
        """bool [L, H, T]: what the method keeps, checked against its capacity."""
        num_tokens, num_prompt = sequence.num_computed, sequence.num_prompt
        mass = None
        if self.wants_mass:
            column = self._arena.by_block("mass")[blocks]  # [N, L * H, block_size]
            mass = column.transpose(0, 1).reshape(*self._shape, -1)[..., :num_tokens]
        positions = torch.arange(num_tokens, dtype=torch.int32, device=self._device)
        capacity = self._retention.capacity(num_prompt)
        assert capacity is not None
        kept = self._retention.keep(PromptView(num_tokens, num_prompt, capacity, self._shape, positions, mass))
        allowed = capacity + (num_tokens - num_prompt if self._retention.grows else 0)
        most = int(kept.sum(-1).max())
        if kept.shape != (*self._shape, num_tokens) or most > max(allowed, 0):
            raise ValueError(
                f"{self._retention.name} kept {most} of {num_tokens} tokens as {tuple(kept.shape)}; "
                f"at most {allowed} per layer and head may stay, told as a mask of {(*self._shape, num_tokens)}"
            )
        return kept

    def _num_pages(self, sequence: Seq) -> int:
        """Pages of a head: for all it may ever hold, or where the cache grows for the tokens there are."""
        grown = sequence.num_prompt + sequence.params.max_tokens
        most = self._most(sequence.num_prompt, len(sequence.tokens) if self._retention.grows else grown)
        return self._arena.layout.num_blocks_for(most)

    def _each_head(self, num_pages: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        return np.full(self._shape, num_pages, dtype=np.int64)

    def _remember(self, sequence: Seq, tables: Tensor, counts: Tensor) -> None:
        row, capacity = sequence.row, self._retention.capacity(sequence.num_prompt)
        assert row is not None and capacity is not None
        self._note_tables(row, tables)
        self._used[row] = counts
        self._write[row] = counts
        self._capacity[row] = torch.iinfo(torch.int32).max if self._retention.grows else capacity

    def _note_tables(self, row: int, tables: Tensor) -> None:
        num_entries = tables.shape[-1]
        if num_entries > self._tables.shape[-1]:
            grown = self._tables.new_zeros((*self._tables.shape[:-1], num_entries))
            grown[..., : self._tables.shape[-1]] = self._tables
            self._tables = grown
        self._tables[row, ..., :num_entries] = tables
        self._pages_held[row] = num_entries

    def _attest(self, sequence: Seq, num_tokens: int, counts: Tensor, tables: Tensor) -> None:
        layout = self._arena.layout
        dropped = num_tokens * counts.numel() - int(counts.sum())
        held_before = layout.num_blocks_for(num_tokens) * layout.pages_per_block
        attestation = sequence.attestation
        attestation.tokens_dropped += dropped
        attestation.bytes_freed += max(0, held_before - tables.numel()) * layout.page_bytes
        attestation.did[self._retention.name] = attestation.did.get(self._retention.name, 0) + dropped

    # -- decoding -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Seq) -> bool:
        """A head at its capacity gives up a victim; where nothing is given up, a full last page asks for another."""
        row = sequence.row
        num_pages = self._num_pages(sequence) if self._retention.grows else 0
        assert row is not None
        if num_pages <= self._pages_held[row]:
            return True
        pages = self._cache.grow_pages(row, self._each_head(num_pages))
        if pages is None:
            return False
        self._note_tables(row, torch.from_numpy(pages).to(self._device))
        return True

    def part(self, sequences: Sequence[Seq], rows: slice) -> PagePart:
        """The new tokens go where `write` says; columns of those slots start afresh."""
        index = torch.tensor([s.row for s in sequences], device=self._device)
        positions = torch.tensor([s.num_computed for s in sequences], dtype=torch.int32, device=self._device)
        tables = self._tables[index].permute(1, 0, 2, 3).contiguous()
        write = self._write[index].permute(1, 0, 2)
        slots = slots_of(tables, write, self._arena.layout.block_size)
        self._used[index] = torch.maximum(self._used[index], self._write[index] + 1)
        self._reset_columns(slots, positions)
        return PagePart(
            rows,
            self._kernels,
            self._arena,
            torch.arange(len(sequences) + 1, dtype=torch.int32, device=self._device),
            positions,
            tables,
            self._used[index].permute(1, 0, 2).contiguous(),
            slots,
            mass=self._ranks_victims,
        )

    def _reset_columns(self, slots: Tensor, positions: Tensor) -> None:
        """A slot that is written anew has its token's position and has received nothing yet."""
        self._arena.columns["positions"].view(-1)[slots] = positions[:, None].expand(slots.shape)
        if self._ranks_victims:
            self._arena.columns["mass"].view(-1)[slots] = 0.0

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Where a head holds more than it may, the method names a victim; elsewhere the next token goes to the end."""
        index = torch.tensor([s.row for s in sequences], device=self._device)
        used = self._used[index]
        over = used > self._capacity[index][:, None, None]
        self._write[index] = used
        late = [s for s, is_over in zip(sequences, over.flatten(1).any(1).tolist(), strict=True) if is_over]
        failures = self._evict(late) if late else []
        for sequence, num_over in zip(sequences, over.sum((1, 2)).tolist(), strict=True):
            sequence.attestation.tokens_dropped += num_over
            sequence.attestation.did[self._retention.name] += num_over
        return failures

    def _evict(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Let the method name the victims of requests that hold more than they may."""
        index = torch.tensor([s.row for s in sequences], device=self._device)
        used = self._used[index]
        try:
            victims = self._retention.victims(self._view(index, sequences)).to(torch.int32)
            if victims.shape != used.shape or bool(((victims < 0) | (victims >= used)).any()):
                raise ValueError(f"{self._retention.name} named a victim that is no slot in use")
        except Exception as error:  # a method is somebody's code: it may raise anything
            if len(sequences) == 1:
                return [(sequences[0], error)]
            # Asked one by one, only the requests that it fails on suffer.
            return [failure for sequence in sequences for failure in self._evict([sequence])]
        over = used > self._capacity[index][:, None, None]
        self._write[index] = torch.where(over, victims, used)
        return []

    def _view(self, index: Tensor, sequences: Sequence[Seq]) -> DecodeView:
        size = self._arena.layout.block_size
        used = self._used[index]
        num_pages = -(-int(used.max()) // size)
        tables = self._tables[index][..., :num_pages].long()
        columns = {name: c[tables].flatten(-2) for name, c in self._arena.columns.items()}
        in_use = torch.arange(num_pages * size, device=self._device) < used[..., None]
        num_tokens = torch.tensor([s.num_computed for s in sequences], device=self._device)
        return DecodeView(columns["positions"], columns.get("mass"), in_use, num_tokens, self._capacity[index].long())

    # -- the rest -----------------------------------------------------------------------------------------------

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Nothing to do: masses were accumulated by the kernel."""
        return []

    def kept_positions(self, sequence: Seq) -> list[list[list[int]]]:
        """Logical positions held by each layer and head, sorted: what the method has kept so far."""
        assert sequence.row is not None
        index = torch.tensor([sequence.row], device=self._device)
        view = self._view(index, [sequence])
        hole = self._write[sequence.row]
        found = []
        for layer in range(self._shape[0]):
            found.append([self._held(view, hole, layer, head) for head in range(self._shape[1])])
        return found

    def _held(self, view: DecodeView, hole: Tensor, layer: int, head: int) -> list[int]:
        in_use = view.used[0, layer, head].clone()
        if int(hole[layer, head]) < in_use.numel():
            in_use[int(hole[layer, head])] = False  # the victim's slot: free, only not yet written over
        return sorted(view.positions[0, layer, head][in_use].tolist())

    def release(self, sequence: Seq) -> None:
        """The row's state is overwritten when the row is used again."""

    def kv_bytes(self) -> Mapping[str, int]:
        """Nothing is held outside the pool."""
        return {}

    def links(self) -> Mapping[str, str]:
        """No link is used."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""
