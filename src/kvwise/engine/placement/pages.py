"""Pages per layer and head: after prefill only what stays is held, packed if it is encoded; later victims make room."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.core.output import HeadReport
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.evicting import Evictor
from kvwise.engine.placement.heirs import Heir
from kvwise.engine.placement.observed import ObservedQueries
from kvwise.engine.placement.page_attest import PageAttester
from kvwise.engine.placement.page_part import PagePart
from kvwise.engine.placement.page_room import PageRoom
from kvwise.engine.placement.page_state import UNLIMITED, Counts, PageState
from kvwise.engine.placement.sealing import Sealer
from kvwise.engine.placement.settling import Settler, counts_of
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels, Marks
from kvwise.methods.encoding.base import Encoding
from kvwise.methods.retention.base import Kept, Residual, Retention
from kvwise.models.attention import Observer
from kvwise.models.loaded import LayerAttention
from kvwise.tiers.arena import Arena

Pages = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class PagePlacement:
    """Carries out a retention method and an encoding.

    A head that may hold a fixed number of tokens has all its pages for good; one that grows, or whose tokens are
    packed in time, gets a page whenever the last is full. See `PageState` for where a token lies.
    """

    settles = True
    looks_ahead = False

    def __init__(
        self, retention: Retention, encoding: Encoding, cache: CacheManager, arena: Arena, kernels: Kernels,
        layers: Sequence[LayerAttention], max_rows: int, residual: Residual | None = None,
        demoter: Heir | None = None,
    ) -> None:  # fmt: skip
        self._retention = retention
        self._encoding = encoding
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self._residual = residual
        self.wants_mass = retention.needs_mass and retention.drops
        self._tracks_mass = retention.drops and (retention.marks_rows or (self.wants_mass and retention.tracks_mass))
        self._device = arena.keys.device
        self._size = arena.layout.block_size
        self._shape = (arena.layout.num_layers, arena.layout.num_kv_heads)
        self._state = PageState(arena.layout, max_rows, self._device)
        self._sealer = None if arena.packed is None else Sealer(encoding, cache, arena, kernels, self._state)
        self._observed = ObservedQueries(self.observed_rows)
        self._settler = Settler(retention, arena, kernels, layers, self._observed)
        self._group = layers[0].num_query_heads // layers[0].num_kv_heads
        self._evictor = Evictor(retention, cache, arena, kernels, self._state, self._sealer, residual, demoter)
        self._room = PageRoom(retention, encoding, arena)
        self._attester = PageAttester(
            retention, encoding, cache, arena, self._state, self._sealer, demotes=demoter is not None
        )
        self._quiet = np.zeros(max_rows, np.int64)  # tokens a row can still add before anything must be made room for

    # -- what it may hold ---------------------------------------------------------------------------------------

    def observed_rows(self, sequence: Seq) -> int:
        """Of the prompt's last rows, as many as either method looks at."""
        num_prompt = sequence.num_prompt
        kept = self._retention.observed_rows(num_prompt, sequence.image_spans) if self._retention.drops else 0
        return min(num_prompt, max(kept, self._encoding.observed_rows))

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The pool must hold all a head may ever keep, and what is packed while it is packed."""
        return self._room.room_for(num_prompt, num_tokens)

    def admit(self, sequence: Seq) -> bool:
        """Nothing is needed outside the pool."""
        return True

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Nothing is held outside the pool: masses are forked with the blocks they lie beside."""
        self._observed.fork(source, sibling)
        return True

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Remembers the rows that methods look at."""
        if any(self.observed_rows(sequence) for sequence, _ in prefills):
            return _RowObserver(self._observed, prefills)
        return None

    # -- after prefill ------------------------------------------------------------------------------------------

    def settle(self, sequence: Seq) -> bool:
        """Keep what the method keeps, free every other page, and pack what is due.

        Where room gives out half-way, what has moved stays moved, and the next call goes on from there.
        """
        row = sequence.row
        assert row is not None
        if not self._cache.holds_pages(row) and not self._rearrange(sequence, row):
            return False
        if self._sealer is not None and not self._pack_prompt(row):
            return False
        self._quiet[row] = 0
        self._observed.forget(sequence)
        self._attester.settled(sequence, row)
        return True

    def _rearrange(self, sequence: Seq, row: int) -> bool:
        num_blocks = self._arena.layout.num_blocks_for(sequence.num_computed)
        blocks = torch.from_numpy(self._cache.tables[row, :num_blocks].astype(np.int64)).to(self._device)
        prompt = self._settler.prompt(sequence, blocks)
        kept = self._settler.ask(sequence, prompt)
        counts, limit = counts_of(kept.mask), self._limit(kept)
        pages = self._cache.paginate(row, self._first_pages(sequence, counts, limit))
        if pages is None:
            return False
        if self._sealer is not None:
            view = self._settler.channel_view(sequence, prompt, self._encoding.observed_rows)
            self._sealer.note_channels(row, self._encoding.channels(view))
        self._evictor.leave_prompt(row, kept, prompt)
        self._settler.move(kept, prompt, torch.from_numpy(pages).to(self._device))
        self._cache.finish_paginate(row)
        self._state.start(row, counts, limit)
        if self._sealer is not None:
            self._state.most[row] = UNLIMITED  # until the evictor says otherwise
        self._state.note_tables(row, pages)
        if kept.marks is not None:
            self._state.marks[row] = kept.marks.float().cpu().numpy()
        self._attester.kept(sequence, kept, counts)
        return True

    def _limit(self, kept: Kept) -> Counts:
        if kept.limit is None:
            return np.full(self._shape, UNLIMITED, np.int32)
        limit: Counts = np.maximum(kept.limit.cpu().numpy(), 1).astype(np.int32)
        return limit

    def _first_pages(self, sequence: Seq, counts: Counts, limit: Counts) -> Pages:
        """Pages of each head: for all it may ever hold, or for the tokens there are and the next."""
        wanted = counts.astype(np.int64) + 1
        if self._sealer is None:
            longest = sequence.num_prompt + sequence.params.max_tokens
            final = np.minimum(limit.astype(np.int64), longest) + 1
            wanted = np.where(limit < UNLIMITED, np.maximum(final, counts), wanted)
        return np.asarray(-(-wanted // self._size))

    def _pack_prompt(self, row: int) -> bool:
        """Pack layer by layer, and free each layer's pages before the next needs its packed ones."""
        sealer, state = self._sealer, self._state
        assert sealer is not None
        every = state.all_heads(np.array([row]))
        for layer in range(self._shape[0]):
            keys, values = sealer.due(row, settling=True)
            mine = every.layers == layer
            wanted = sealer.pages_after(row, np.where(np.arange(self._shape[0])[:, None] == layer, keys, 0))
            if not sealer.reserve(row, wanted):
                return False
            heads = every[np.flatnonzero(mine)]
            sealer.seal(heads, keys[layer].astype(np.int64), values[layer].astype(np.int64))
            self._shift(row)
        return True

    # -- decoding -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Seq) -> bool:
        """Room for the next token of every head, and for what is due to be packed behind it."""
        row = sequence.row
        assert row is not None
        if self._quiet[row] > 0:
            self._quiet[row] -= 1
            return True
        if self._sealer is not None and not self._sealer.reserve(
            row, self._sealer.pages_after(row, self._sealer.due(row, 1)[0])
        ):
            return False
        if not self._shift(row, more=1):
            return False
        self._quiet[row] = self._num_quiet(row)
        return True

    def _shift(self, row: int, more: int = 0) -> bool:
        """Let go of open pages all of whose tokens are packed, and have those that `more` tokens need."""
        state = self._state
        dropped = (state.value_length[row] - state.open_base[row]) // self._size
        ends = self._grows_at_end(row)
        wanted = (state.num_open[row] + np.where(ends, more, 0)).astype(np.int64)
        ragged = len(np.unique(wanted)) > 1
        # Heads of unequal lengths would ask for a page one after the other: those that are nearly full ask together.
        slack = self._size // 2 if ragged and more else 0
        held = self._cache.page_table(row)[1]
        needed = -(-(wanted + np.where(ends, slack, 0)) // self._size)
        num_pages = (np.maximum(needed, held) if self._sealer is None else needed) - dropped
        if not dropped.any() and (num_pages == held).all():
            return True
        tables = self._cache.shift_pages(row, dropped.astype(np.int64), num_pages.astype(np.int64))
        if tables is None:
            return False
        state.open_base[row] += dropped * self._size
        state.write[row] -= dropped * self._size
        state.note_tables(row, tables)
        return True

    def _grows_at_end(self, row: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Heads [L, H] whose next token goes behind the last one; in the others it takes a victim's place."""
        return np.asarray(self._state.used[row] <= self._state.most[row])

    def _num_quiet(self, row: int) -> int:
        """Tokens after the next one for which no page need be asked for."""
        state = self._state
        ends = self._grows_at_end(row)
        if not ends.any():
            return int(np.iinfo(np.int64).max)
        free = self._cache.page_table(row)[1] * self._size - state.num_open[row] - 1
        quiet = int(free[ends].min())
        if self._sealer is not None:
            held = self._cache.packed_table(row)[1]
            for more in range(2, quiet + 2):
                if (self._sealer.pages_after(row, self._sealer.due(row, more)[0]) > held).any():
                    return more - 2
        return quiet

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> PagePart:
        """The new tokens go where `write` says; columns of those slots start afresh."""
        state = self._state
        held = np.array([s.row for s in sequences], dtype=np.int64)
        index = torch.from_numpy(held).to(self._device)
        positions = torch.tensor([s.num_computed for s in sequences], dtype=torch.int32, device=self._device)
        at_end = state.used[held] <= state.most[held]
        state.used[held] += at_end
        longest = max(1, int(-(-state.num_open[held].max() // self._size)))
        tables = state.tables[index, ..., :longest].transpose(0, 1).contiguous()
        write = state.on_device(state.write[held].swapaxes(0, 1).astype(np.int64))
        slots = tables.gather(-1, (write // self._size)[..., None])[..., 0].long() * self._size + write % self._size
        self._start_columns(slots, positions)
        lengths = state.on_device(np.ascontiguousarray(state.used[held].swapaxes(0, 1)))
        return PagePart(
            rows,
            self._kernels,
            self._arena,
            torch.arange(len(sequences) + 1, dtype=torch.int32, device=self._device),
            positions,
            tables,
            lengths,
            slots,
            index,
            mass=self._tracks_mass,
            sealed=None if self._sealer is None else self._sealer.segments(held, mass=self._tracks_mass),
            residual=self._residual,
            marks=self._marks(held, positions) if self._retention.drops and self._retention.marks_rows else None,
        )

    def _marks(self, rows: Pages, positions: Tensor) -> list[Marks]:
        """Tokens that the new row attends to (at least 1 / number of keys, on average of the group) are marked."""
        bound = (self._group / self._state.used[rows].swapaxes(0, 1)).astype(np.float32)
        return [Marks(layer, positions.float()) for layer in self._state.on_device(bound)]

    def _start_columns(self, slots: Tensor, positions: Tensor) -> None:
        """A slot that is written anew has its token's position and has received nothing yet."""
        columns = self._arena.columns
        if "positions" in columns:
            columns["positions"].view(-1)[slots] = positions[:, None].expand(slots.shape)
        for name in columns.keys() - {"positions"}:
            columns[name].view(-1)[slots] = 0.0

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Heads that hold more than they may give up victims, then what is due is packed."""
        rows = np.array([s.row for s in sequences], dtype=np.int64)
        self._state.note_ends(rows)
        failures = self._evictor.after_step(sequences) if self._retention.drops else []
        interval = self._retention.sweep_interval
        if interval is not None:
            swept = [s.num_computed % interval == 0 for s in sequences]
            self._quiet[rows[swept]] = 0  # a sweep has given pages back
        if self._sealer is not None and not self._sealer.packs_output.all():
            self._quiet[rows] = 0  # heads begin to take victims' places, or end it
        if self._sealer is not None:
            self._pack_due(rows)
        return failures

    def _pack_due(self, rows: Pages) -> None:
        assert self._sealer is not None
        due = [self._sealer.due(int(row)) for row in rows]
        keys = np.stack([k for k, _ in due]).ravel()
        values = np.stack([v for _, v in due]).ravel()
        some = np.flatnonzero((keys > 0) | (values > 0))
        if len(some):
            heads = self._state.all_heads(rows)[some]
            self._sealer.seal(heads, keys[some].astype(np.int64), values[some].astype(np.int64))

    # -- attestation --------------------------------------------------------------------------------------------

    def num_leaving(self, sequence: Seq) -> Counts:
        """How many tokens of each layer [L] leave behind the next one, of a method that gives up one for one."""
        state, row = self._state, sequence.row
        return np.asarray((state.used[row] >= state.limit[row]).any(1), dtype=np.int32)

    def kept_positions(self, sequence: Seq) -> list[list[list[int]]]:
        """Logical positions held by each layer and head, sorted: what the method has kept so far."""
        assert sequence.row is not None
        return self._evictor.kept_positions(sequence)

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """What each layer and head holds now."""
        assert sequence.row is not None
        packed = self._state.key_length[sequence.row].tolist()
        kept = self.kept_positions(sequence)
        return [
            [HeadReport(held, count) for held, count in zip(*layer, strict=True)]
            for layer in zip(kept, packed, strict=True)
        ]

    # -- the rest -----------------------------------------------------------------------------------------------

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Nothing to do: masses were accumulated by the kernel."""
        return []

    def release(self, sequence: Seq) -> None:
        """The row's state is overwritten when the row is used again."""
        self._observed.forget(sequence)

    def kv_bytes(self) -> Mapping[str, int]:
        """What stands for tokens that have left."""
        return {} if self._residual is None else {"device": self._residual.num_bytes}

    def links(self) -> Mapping[str, str]:
        """No link is used."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""


class _RowObserver:
    """Hands the queries of a step's prompt tokens to whoever remembers them."""

    def __init__(self, observed: ObservedQueries, prefills: Sequence[tuple[Seq, int]]) -> None:
        self._observed = observed
        self._prefills = prefills

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """See queries [T, Hq, D] of the whole part."""
        self._observed.observe(self._prefills, layer, queries)
