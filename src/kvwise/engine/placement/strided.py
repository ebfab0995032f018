"""Strides: requests in pages of their own from the start, read stride by stride at constant memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.core.output import HeadReport
from kvwise.engine.placement.base import Failure, ReadsInStrides
from kvwise.engine.placement.stretches import Stretches
from kvwise.engine.placement.strided_part import StridedPart
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels
from kvwise.methods.retention.strided import Ints, Layout, Moves, Strided
from kvwise.models.attention import Observer
from kvwise.models.rotation import Rotation
from kvwise.tiers.arena import Arena

MOST_WEIGHT = 8.0  # nats: rows whose weight in the mass is higher make all of it be scaled down first


@dataclass(frozen=True, slots=True)
class _Due:
    """A sequence whose stride has been read: so many tokens, behind a layout."""

    sequence: Seq
    row: int
    layout: Layout
    num_new: int


class StridedPlacement(ReadsInStrides):
    """Carries out a `Strided` method. All layers and heads of a request have their tokens in the same slots."""

    settles = True
    wants_mass = False
    looks_ahead = False

    def __init__(
        self, retention: Strided, cache: CacheManager, arena: Arena, kernels: Kernels, rotations: Sequence[Rotation],
        max_rows: int,
    ) -> None:  # fmt: skip
        self._retention = retention
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self._rotations = rotations
        self._size = arena.layout.block_size
        self._shape = (arena.layout.num_layers, arena.layout.num_kv_heads)
        self._device = arena.keys.device
        self._layouts: dict[Seq, Layout] = {}
        self._bases: dict[Seq, int] = {}  # the position of the row whose attention counts once in the mass
        self._slots = torch.zeros((max_rows, *self._shape, 1), dtype=torch.int64, device=self._device)
        self._stretches = Stretches(self._device, arena.layout.block_size)

    # -- what it may hold ---------------------------------------------------------------------------------------

    def observed_rows(self, sequence: Seq) -> int:
        """None are looked at by themselves."""
        return 0

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The pool must hold what is kept and a stride, not the prompt."""
        most = self._num_slots(num_prompt, num_tokens)
        if self._arena.layout.num_blocks_for(most) <= self._arena.num_blocks:
            return None
        return (
            f"{self._retention} needs {most} slots for a prompt of {num_prompt} tokens, stride included, and the pool "
            f"holds {self._arena.num_blocks * self._size}: raise kv_cache_memory_bytes, or shorten the strides"
        )

    def _num_slots(self, num_prompt: int, num_tokens: int) -> int:
        """The most a head needs at once when `num_tokens` are read in strides, and then at least one by itself."""
        kept = self._retention.num_slots(num_prompt)
        first = min(self._retention.strides or num_prompt, num_prompt)
        rest = min(self._retention.strides or num_tokens, num_tokens - first)
        return max(first, kept + max(1, rest))

    def admit(self, sequence: Seq) -> bool:
        """Nothing is needed outside the pool."""
        return True

    def start(self, sequence: Seq) -> bool:
        """Hold pages for what will be kept and the longest stride. False: no room now, nothing is held."""
        row = sequence.row
        assert row is not None
        most = self._num_slots(sequence.num_prompt, len(sequence.tokens))
        num_pages = np.full(self._shape, self._arena.layout.num_blocks_for(most), np.int64)
        pages = self._cache.paginate(row, num_pages)
        if pages is None:
            return False
        self._cache.finish_paginate(row)
        self._note_pages(row, pages)
        self._layouts[sequence] = self._retention.start(sequence.num_prompt)
        self._bases[sequence] = 0
        return True

    def _note_pages(self, row: int, pages: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
        inside = torch.arange(self._size, device=self._device)
        slots = (torch.from_numpy(pages).to(self._device).long()[..., None] * self._size + inside).flatten(-2)
        width = slots.shape[-1]
        if width > self._slots.shape[-1]:
            self._slots = torch.nn.functional.pad(self._slots, (0, width - self._slots.shape[-1]))
        self._slots[row, ..., :width] = slots
        self._stretches.forget()

    def num_next(self, sequence: Seq) -> int:
        """Tokens up to the end of the stride; one never reaches over the end of the prompt."""
        start = self._layouts[sequence].num_tokens if sequence in self._layouts else 0
        stop = len(sequence.tokens)
        if self._retention.strides is not None:
            stop = min(stop, start + self._retention.strides)
        if start < sequence.num_prompt:
            stop = min(stop, sequence.num_prompt)
        return stop - sequence.num_computed

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Never asked: rows of pages do not fork."""
        return False

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Nobody looks."""
        return None

    # -- a step -------------------------------------------------------------------------------------------------

    def settle(self, sequence: Seq) -> bool:
        """The prompt has been read: from now on strides are single tokens, and the pages of longer ones are free."""
        row = sequence.row
        assert row is not None
        layout, told = self._arena.layout, sequence.attestation
        most = self._retention.num_slots(sequence.num_prompt) + 1
        num_pages = min(layout.num_blocks_for(most), int(self._cache.page_table(row)[1][0, 0]))
        self._note_pages(row, self._cache.trim_pages(row, np.full(self._shape, num_pages, np.int64)))
        held = num_pages * layout.block_bytes
        told.bytes_freed += max(0, layout.num_blocks_for(sequence.num_computed) * layout.block_bytes - held)
        told.bits_per_element = 8.0 * layout.element_bytes
        return True

    def grow(self, sequence: Seq) -> bool:
        """A place for the next token has been held all along."""
        return True

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> StridedPart:
        """The new tokens go behind those of the stride so far, and that behind what is kept."""
        held = [self._layouts[s] for s in sequences]
        ends = [layout.end + s.num_computed - layout.num_tokens for s, layout in zip(sequences, held, strict=True)]
        where = [s.row for s in sequences if s.row is not None]
        stretched = self._stretches.of(where, held, ends, counts, self._slots)
        self._start_columns(stretched.slots, sequences, counts)
        fading = self._fading(sequences, counts)
        return StridedPart(rows, self._kernels, self._arena, stretched, fading, self._rotations)

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _start_columns(self, slots: Tensor, sequences: Sequence[Seq], counts: Sequence[int]) -> None:
        """New tokens have their position, and 0 in every other column."""
        spans = [np.arange(s.num_computed, s.num_computed + n) for s, n in zip(sequences, counts, strict=True)]
        positions = self._on_device(np.concatenate(spans))[:, None].expand(slots.shape).flatten()
        for name, column in self._arena.columns.items():
            value = positions if name == "positions" else torch.zeros_like(positions)
            self._kernels.scatter(value, column, slots.flatten())

    def _fading(self, sequences: Sequence[Seq], counts: Sequence[int]) -> Tensor | None:
        """How much below 0 the rows' log weights are, float32 [T]; None: all rows weigh the same."""
        decay = -math.log(self._retention.row_decay)
        if decay == 0.0:
            return None
        rows = []
        for sequence, n in zip(sequences, counts, strict=True):
            last = sequence.num_computed + self.num_next(sequence) - 1
            if (last - self._bases[sequence]) * decay > MOST_WEIGHT:
                self._scale_mass(sequence, math.exp((self._bases[sequence] - last) * decay))
                self._bases[sequence] = last
            first = self._bases[sequence] - sequence.num_computed
            rows.append(np.arange(first, first - n, -1))
        return torch.from_numpy(np.concatenate(rows) * decay).float().to(self._device)

    def _scale_mass(self, sequence: Seq, factor: float) -> None:
        """Of all tokens of the sequence that have been read."""
        layout, column = self._layouts[sequence], self._arena.columns["mass"]
        num_slots = layout.end + sequence.num_computed - layout.num_tokens
        where = self._slots[sequence.row, ..., :num_slots].flatten()
        self._kernels.scatter(self._kernels.gather(column, where) * factor, column, where)

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """See `after_decode_step`."""
        return []

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Strides that have been read to their end are taken in."""
        due = []
        for sequence in sequences:
            layout, row = self._layouts[sequence], sequence.row
            assert row is not None
            if self.num_next(sequence) == 0:
                due.append(_Due(sequence, row, layout, sequence.num_computed - layout.num_tokens))
        return self._take_in(due)

    def _take_in(self, due: Sequence[_Due]) -> list[Failure]:
        """All at once; if that fails, one by one: only the requests that it fails on suffer."""
        if not due:
            return []
        try:
            moves = self._ask(due)
        except Exception as error:  # a method is somebody's code: it may raise anything
            if len(due) == 1:
                return [(due[0].sequence, error)]
            return [failure for one in due for failure in self._take_in([one])]
        self._move(due, moves)
        return []

    def _ask(self, due: Sequence[_Due]) -> list[Moves]:
        asked = [self._retention.asks(one.layout, one.num_new) for one in due]
        where = self._in_arena(due, [slots[:, None, None] for slots in asked])
        mass = self._kernels.gather(self._arena.columns["mass"], where.flatten()).view(where.shape).cpu().numpy()
        stops = np.cumsum([len(slots) for slots in asked])
        return [
            self._retention.arrange(one.layout, one.num_new, slots, mass[stop - len(slots) : stop].transpose(1, 2, 0))
            for one, slots, stop in zip(due, asked, stops, strict=True)
        ]

    def _in_arena(self, due: Sequence[_Due], slots: Sequence[Ints]) -> Tensor:
        """Slots [..., n, L, H] of each sequence (L, H may be 1: all the same), int64 [..., N, L, H] in the arena."""
        _, num_layers, num_heads, width = self._slots.shape
        rows = np.repeat([one.row for one in due], [of.shape[-3] for of in slots])
        heads = np.arange(num_layers * num_heads).reshape(num_layers, num_heads) * width
        index = np.concatenate(slots, -3) + heads + (rows * num_layers * num_heads * width)[:, None, None]
        return self._slots.view(-1).index_select(0, self._on_device(index.ravel())).view(index.shape)

    def _move(self, due: Sequence[_Due], moves: Sequence[Moves]) -> None:
        source, target = self._in_arena(due, [_pairs(move) for move in moves]).flatten(1)
        keys = self._kernels.gather(self._arena.keys, source)
        if self._retention.turns:
            turns = np.concatenate([_turns(one, move) for one, move in zip(due, moves, strict=True)])
            self._rotate(keys, np.broadcast_to(turns, (len(turns), *self._shape)))
        self._kernels.scatter(keys, self._arena.keys, target)
        for column in (self._arena.values, *self._arena.columns.values()):
            self._kernels.scatter(self._kernels.gather(column, source), column, target)
        for one, move in zip(due, moves, strict=True):
            self._layouts[one.sequence] = move.layout
            self._attest(one, move)

    def _rotate(self, keys: Tensor, turns: Ints) -> None:
        """Rotate keys [N * L * H, D] in place by so many positions [N, L, H]."""
        delta, rows = self._on_device(np.ascontiguousarray(turns)), keys.view(*turns.shape, keys.shape[-1])
        whose = [rotation.inv_freq.data_ptr() for rotation in self._rotations]
        for rotation in {rotation.inv_freq.data_ptr(): rotation for rotation in self._rotations}.values():
            if not len(rotation.inv_freq):
                continue
            layers = [i for i, address in enumerate(whose) if address == rotation.inv_freq.data_ptr()]
            of = slice(None) if len(layers) == len(whose) else layers
            turned = self._kernels.rotate(
                rows[:, of].flatten(0, 2), delta[:, of].flatten(), rotation.inv_freq, interleaved=rotation.interleaved
            )
            rows[:, of] = turned.view(rows[:, of].shape)

    # -- attestation --------------------------------------------------------------------------------------------

    def _attest(self, one: _Due, move: Moves) -> None:
        num_left = sum(run.length for run in one.layout.runs) + one.num_new - sum(r.length for r in move.layout.runs)
        count, told = num_left * self._shape[0] * self._shape[1], one.sequence.attestation
        told.tokens_dropped += count
        told.did[self._retention.name] = told.did.get(self._retention.name, 0) + count

    def kept_positions(self, sequence: Seq) -> list[list[list[int]]]:
        """Logical positions held by each layer and head, sorted: what is kept and the stride so far."""
        layout = self._layouts[sequence]
        used = [np.arange(run.start, run.start + run.length) for run in layout.runs]
        read = sequence.num_computed - layout.num_tokens
        index = self._on_device(np.concatenate([*used, np.arange(layout.end, layout.end + read)]))
        slots = self._slots[sequence.row, ..., index]
        positions: list[list[list[int]]] = self._arena.columns["positions"].view(-1)[slots].sort(-1).values.tolist()
        return positions

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """What each layer and head holds now."""
        return [[HeadReport(head) for head in layer] for layer in self.kept_positions(sequence)]

    # -- the rest -----------------------------------------------------------------------------------------------

    def release(self, sequence: Seq) -> None:
        """Its pages are the cache manager's to free."""
        self._layouts.pop(sequence, None)
        self._bases.pop(sequence, None)

    def kv_bytes(self) -> Mapping[str, int]:
        """Nothing is held outside the device pool."""
        return {}

    def links(self) -> Mapping[str, str]:
        """No link is used."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""


def _pairs(move: Moves) -> Ints:
    """Sources and targets, int64 [2, n, L, H or 1]."""
    pairs = np.empty((2, len(move.target), *move.source.shape[:2]), np.int64)
    pairs[0], pairs[1] = move.source.transpose(2, 0, 1), move.target[:, None, None]
    return pairs


def _turns(one: _Due, move: Moves) -> Ints:
    """By how many positions the moved keys are to be rotated, int64 [n, L, H or 1]."""
    new = np.arange(one.layout.num_tokens, one.layout.num_tokens + one.num_new)
    before = np.concatenate([one.layout.rotation, new])
    turns: Ints = move.layout.rotation[move.target][:, None, None] - before[move.source.transpose(2, 0, 1)]
    return turns
