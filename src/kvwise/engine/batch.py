"""One step's flat batch: tokens, positions and, for each part, where its KV is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.engine.hierarchy.loads import Loads
from kvwise.engine.placement.base import Placement
from kvwise.engine.scheduler import Scheduled
from kvwise.engine.seeing import Shown, splice
from kvwise.engine.sequence import Sequence as Request
from kvwise.kernels.base import Kernels
from kvwise.models.attention import BlockPart, Part, StepBatch
from kvwise.models.hook import Splice
from kvwise.tiers.arena import Arena

Int64 = npt.NDArray[np.int64]
NOTHING: Mapping[Request, Sequence[Shown]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step hands to the model, and which of its rows are sampled.

    `tokens` and `positions` int64 [T]; `logit_rows` int64 [R] are the last rows of `sampled`, in that order. `order`
    is the schedule in the order of the flat batch: sequences in blocks first, settled ones behind them. `rotations`
    int64 [3, T] is by what the model rotates, where that is not the position; `splice` is what image tokens show.
    """

    tokens: Tensor
    positions: Tensor
    logit_rows: Tensor
    step: StepBatch
    order: list[Scheduled]
    sampled: list[Scheduled]
    rotations: Tensor | None = None
    splice: Splice | None = None


class BatchBuilder:
    """Lays out steps for one engine."""

    def __init__(
        self, cache: CacheManager, arena: Arena, kernels: Kernels, placement: Placement, loads: Loads | None = None
    ) -> None:
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self._placement = placement
        self._loads = loads
        self._device = arena.keys.device

    def build(self, schedule: Sequence[Scheduled], shown: Mapping[Request, Sequence[Shown]] = NOTHING) -> Batch:
        """Flatten a schedule, of which image tokens show `shown`."""
        in_blocks = [s for s in schedule if not s.sequence.settled]
        settled = [s for s in schedule if s.sequence.settled]
        order = in_blocks + settled
        num_in_blocks = sum(s.num_tokens for s in in_blocks)
        parts: list[Part] = []
        if in_blocks:
            parts.append(self._block_part(in_blocks, num_in_blocks))
        if settled:
            counts = [s.num_tokens for s in settled]
            rows = slice(num_in_blocks, num_in_blocks + sum(counts))
            parts.append(self._placement.part([s.sequence for s in settled], counts, rows))
        tokens, positions = _tokens_and_positions(order)
        ends = np.cumsum([s.num_tokens for s in order]) - 1
        sampled = [i for i, s in enumerate(order) if s.samples]
        rotations = _rotations(order, positions)
        return Batch(
            self._tensor(tokens),
            self._tensor(positions),
            self._tensor(ends[sampled]),
            StepBatch(parts, self._arena.layout.layers, self._gates(order)),
            order,
            [order[i] for i in sampled],
            None if rotations is None else self._tensor(rotations),
            splice(order, shown),
        )

    def _gates(self, order: Sequence[Scheduled]) -> list[Callable[[int], bool]]:
        return [] if self._loads is None else self._loads.gates([item.sequence for item in order])

    def _tensor(self, array: Int64) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _block_part(self, items: Sequence[Scheduled], num_rows: int) -> BlockPart:
        size = self._arena.layout.block_size
        rows = np.array([item.sequence.row for item in items])
        counts = np.array([item.num_tokens for item in items])
        lengths = np.array([item.sequence.num_computed for item in items]) + counts
        longest = int(-(-lengths.max() // size))
        tables = self._cache.tables[rows, :longest]
        positions = _ranges(lengths - counts, counts)
        blocks = tables[np.repeat(np.arange(len(items)), counts), positions // size].astype(np.int64)
        self._start_columns(blocks, positions)
        return BlockPart(
            slice(0, num_rows),
            self._kernels,
            self._arena,
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)).to(self._device),
            torch.from_numpy(tables).to(self._device),
            torch.from_numpy(lengths.astype(np.int32)).to(self._device),
            self._tensor(blocks * size + positions % size),
            mass=self._placement.wants_mass,
            observer=self._placement.observer([(s.sequence, s.num_tokens) for s in items]),
        )

    def _start_columns(self, blocks: Int64, positions: Int64) -> None:
        """New tokens have their position and have received no attention yet, in all layers and heads."""
        size = self._arena.layout.block_size
        where = (self._tensor(blocks), slice(None), self._tensor(positions % size))
        if "positions" in self._arena.columns:
            values = torch.from_numpy(positions.astype(np.int32)).to(self._device)
            self._arena.by_block("positions")[where] = values[:, None]
        if "mass" in self._arena.columns:
            self._arena.by_block("mass")[where] = 0.0


def _ranges(starts: Int64, counts: Int64) -> Int64:
    """starts[0], starts[0] + 1, ... for counts[0] values, then the next: int64."""
    ends = np.cumsum(counts)
    inside = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    return np.asarray(np.repeat(starts, counts) + inside, dtype=np.int64)


def _tokens_and_positions(order: Sequence[Scheduled]) -> tuple[Int64, Int64]:
    tokens: list[int] = []
    for item in order:
        start = item.sequence.num_computed
        tokens += item.sequence.tokens[start : start + item.num_tokens]
    starts = np.array([s.sequence.num_computed for s in order])
    counts = np.array([s.num_tokens for s in order])
    return np.array(tokens, dtype=np.int64), _ranges(starts, counts)


def _rotations(order: Sequence[Scheduled], positions: Int64) -> Int64 | None:
    """[3, T] if the model rotates tokens of some sequence by more than their position, else None."""
    if not any(item.sequence.rotates for item in order):
        return None
    out = np.repeat(positions[None], 3, axis=0)
    row = 0
    for item in order:
        if item.sequence.rotates:
            assert item.sequence.images is not None
            start = item.sequence.num_computed
            out[:, row : row + item.num_tokens] = item.sequence.images.rotations(start, start + item.num_tokens)
        row += item.num_tokens
    return out
