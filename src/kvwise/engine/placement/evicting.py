"""Evicting: who leaves while a settled request decodes, one token for one, in sweeps, or by whole packed pages."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.heirs import Folding, Heir
from kvwise.engine.placement.page_state import UNLIMITED, Counts, Heads, Ints, PageState
from kvwise.engine.placement.sealing import Sealer
from kvwise.engine.placement.settling import PromptKV
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Kernels
from kvwise.methods.retention.base import DecodeView, Kept, Residual, Retention
from kvwise.tiers.arena import Arena

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class Evictor:
    """Asks a retention method who leaves, and carries it out on a `PageState`.

    Tokens in open pages leave one by one: the next token takes a victim's slot, or a sweep moves what stays together.
    Packed tokens share their page's codes, so they leave by whole pages, the one worth least on average first, as soon
    as a head holds a page more than it may. The heirs are told of whoever leaves: what is folded into the `residual`,
    if the method has one, and a `demoter`, which brings them back.
    """

    def __init__(
        self, retention: Retention, cache: CacheManager, arena: Arena, kernels: Kernels, state: PageState,
        sealer: Sealer | None, residual: Residual | None, demoter: Heir | None,
    ) -> None:  # fmt: skip
        self._retention = retention
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self._state = state
        self._sealer = sealer
        self._heirs: list[Heir] = [] if residual is None else [Folding(residual, state.device)]
        self._heirs += [] if demoter is None else [demoter]
        self._demotes = demoter is not None
        self._size = arena.layout.block_size

    def leave_prompt(self, row: int, kept: Kept, prompt: PromptKV) -> None:
        """The prompt's tokens that do not stay leave, before anything is moved."""
        if not self._heirs:
            return
        for heir in self._heirs:
            heir.start(row, kept)
        for layer in range(kept.mask.shape[0]):
            self._leave_layer(row, layer, ~kept.mask[layer], prompt)

    def _leave_layer(self, row: int, layer: int, gone: Tensor, prompt: PromptKV) -> None:
        head, token = gone.nonzero(as_tuple=True)
        places = head.cpu().numpy()
        heads = Heads(np.full_like(places, row), np.full_like(places, layer), places)
        self._tell(heads, prompt.keys(layer)[head, token], prompt.values(layer)[head, token], lambda: token)

    def after_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """The step's tokens are stored and have attended: heads that hold more than they may let somebody go."""
        interval = self._retention.sweep_interval
        if interval is not None:
            due = [s for s in sequences if s.num_computed > s.num_prompt and not s.num_computed % interval]
            return self._each(due, self._sweep)
        rows = _rows(sequences)
        least = 1 if self._sealer is None else np.where(self._sealer.packs_output, self._sealer.page_tokens, 1)
        over: Bools = np.asarray(self._state.used[rows] >= self._state.limit[rows].astype(np.int64) + least)
        late = [s for i, s in enumerate(sequences) if over[i].any()]
        return self._each(late, self._replace if self._sealer is None else self._drop_or_replace)

    def _each(self, sequences: Sequence[Seq], act: Callable[[Sequence[Seq]], None]) -> list[Failure]:
        """Do it for all at once; if that fails, one by one: only the requests that it fails on suffer."""
        if not sequences:
            return []
        try:
            act(sequences)
        except Exception as error:  # a method is somebody's code: it may raise anything
            if len(sequences) == 1:
                return [(sequences[0], error)]
            return [failure for sequence in sequences for failure in self._each([sequence], act)]
        return []

    # -- one for one --------------------------------------------------------------------------------------------

    def _replace(self, sequences: Sequence[Seq]) -> None:
        """In each head that holds more than it may the open token worth least leaves; the next one takes its slot."""
        rows, state = _rows(sequences), self._state
        over = state.used[rows] > state.most[rows]
        if not over.any():
            return
        lowest, victims = self._least_worth(sequences)
        stays = over & ~(lowest < np.inf)  # also where a worth is no number
        if stays.any() and self._sealer is None:
            raise ValueError(f"{self._retention.name} lets no token go in a head that is over its limit")
        state.most[rows] = np.where(stays, UNLIMITED, state.most[rows])
        over &= ~stays
        state.write[rows] = np.where(over, victims, state.write[rows])
        self._leave(rows, over, victims)
        for sequence, count in zip(sequences, over.sum((1, 2)).tolist(), strict=True):
            self._attest(sequence, count)

    def _least_worth(self, sequences: Sequence[Seq]) -> tuple[Floats, Ints]:
        """The least that an open token of each head [B, L, H] is worth, and the open slot of the first such."""
        rows, state = _rows(sequences), self._state
        bounds = ((part[rows] - state.open_base[rows]).ravel() for part in (state.key_length, state.used))
        first, stop = (state.on_device(part) for part in bounds)
        if self._retention.ranks_by_mass and self._sealer is None:
            columns, tables = self._arena.columns, state.tables[state.on_device(rows)].flatten(0, 2)
            newest = state.on_device(self._newest_that_may_leave(sequences).ravel())
            found = self._kernels.lowest_mass(columns["mass"], columns["positions"], tables, first, stop, newest)
        else:
            worth = self._worth(self._view(sequences))[..., self._num_packed_slots(rows) :]
            found = self._kernels.lowest(worth.flatten(0, 2), first, stop)
        lowest, victims = (part.cpu().numpy().reshape(-1, *state.used.shape[1:]) for part in found)
        return lowest, victims

    def _newest_that_may_leave(self, sequences: Sequence[Seq]) -> Counts:
        """The last position [B, L, H] in front of those that the marks protect."""
        marks = self._state.marks[_rows(sequences)]
        num_tokens = np.array([s.num_computed for s in sequences])
        return (num_tokens[:, None, None] - marks).astype(np.int32) - 1

    def _leave(self, rows: Ints, over: Bools, victims: Ints) -> None:
        if not self._heirs:
            return
        b, layer, head = np.nonzero(over)
        heads = Heads(rows[b], layer, head)
        tokens: Ints = victims[over] + self._state.open_base[heads.place]
        self._leave_slots(heads, self._state.open_slots(heads, tokens))

    def _leave_slots(self, heads: Heads, slots: Tensor) -> None:
        arena, gather = self._arena, self._kernels.gather
        positions = partial(gather, arena.columns["positions"], slots)
        self._tell(heads, gather(arena.keys, slots), gather(arena.values, slots), positions)

    def _tell(self, heads: Heads, keys: Tensor, values: Tensor, positions: Callable[[], Tensor]) -> None:
        for heir in self._heirs:
            heir.take(heads, keys, values, positions)

    # -- whole packed pages -------------------------------------------------------------------------------------

    def _drop_or_replace(self, sequences: Sequence[Seq]) -> None:
        """Packed pages leave; where none can and what comes is never packed, open tokens leave one for one."""
        self._drop_pages(sequences)
        self._replace(sequences)

    def _drop_pages(self, sequences: Sequence[Seq]) -> None:
        """In each head over its limit by a page or more, the packed pages worth least on average leave.

        A page with a token that must stay is not among them. Its other tokens that are worth less than whole pages
        would leave before these if they could: what they take counts as if the head might hold it.
        """
        rows, state, size = _rows(sequences), self._state, self._page_tokens
        over = state.used[rows].astype(np.int64) - state.limit[rows]
        left = self._num_loose(rows)
        stays_open = self._stays_open
        if not (((over >= size) & (left > 0)) | (stays_open & (over > 0))).any():
            return
        view = self._view(sequences)
        width = self._packed_width(rows)
        worth = self._worth(view).masked_fill(~view.used, torch.inf)
        worth = worth[..., : width * size].reshape(*view.used.shape[:-1], width, size)
        whole = torch.arange(width, device=worth.device) < state.on_device(state.value_length[rows] // size)[..., None]
        pages = worth.mean(-1).masked_fill(~whole, torch.inf)
        bound = worth.masked_fill(~(whole & pages.isinf())[..., None], torch.inf).flatten(-2)
        gone = np.zeros(tuple(pages.shape), np.bool_)
        while True:
            lowest, least = pages.min(-1)
            kept: Ints = (bound < lowest[..., None]).sum(-1).cpu().numpy()
            goes = (left > 0) & (over - kept >= size) & lowest.isfinite().cpu().numpy()
            if not goes.any():
                break
            b, layer, head = np.nonzero(goes)
            gone[b, layer, head, least.cpu().numpy()[goes]] = True
            pages.masked_fill_(state.on_device(gone), torch.inf)
            over[goes] -= size
            left[goes] -= 1
        fixed = stays_open & lowest.isposinf().cpu().numpy()
        state.most[rows] = np.where(fixed, state.limit[rows] + kept, UNLIMITED)
        self._drop(sequences, gone)

    @property
    def _stays_open(self) -> Bools:
        """Heads [L, H] in which tokens of the output are never packed."""
        assert self._sealer is not None
        return ~self._sealer.packs_output

    def _num_loose(self, rows: Ints) -> Ints:
        """Packed pages [B, L, H] that may leave: not so many that open slot 0 would belong to a token before the first.

        A page shorter than a block is packed before all of its block's open slots are, and these are let go together.
        """
        state = self._state
        return np.asarray(np.minimum(state.value_length[rows], state.open_base[rows]) // self._page_tokens, np.int64)

    @property
    def _page_tokens(self) -> int:
        assert self._sealer is not None
        return self._sealer.page_tokens

    def _drop(self, sequences: Sequence[Seq], gone: Bools) -> None:
        """The packed pages `gone` [B, L, H, M] leave."""
        assert self._sealer is not None
        state, size = self._state, self._sealer.page_tokens
        self._leave_pages(_rows(sequences), gone)
        for sequence, mine in zip(sequences, gone, strict=True):
            row = sequence.row
            assert row is not None
            if not mine.any():
                continue
            held = self._cache.packed_table(row)[0]
            named = np.zeros(held.shape, np.bool_)
            named[..., : mine.shape[-1]] = mine[..., : held.shape[-1]]
            state.note_packed(row, self._cache.drop_packed(row, named))
            count = mine.sum(-1).astype(np.int32) * size
            for part in (state.used, state.key_length, state.value_length, state.open_base):
                part[row] -= count
            self._attest(sequence, int(count.sum()))

    def _leave_pages(self, rows: Ints, gone: Bools) -> None:
        if not self._heirs or not gone.any():
            return
        assert self._sealer is not None
        b, layer, head, nth = np.nonzero(gone)
        heads = Heads(rows[b], layer, head)
        size = self._sealer.page_tokens
        pages = self._state.packed_slots(heads, nth * size, size) // size
        keys, values = self._kernels.unseal(self._sealer.packed, pages)
        column, tokens = self._sealer.columns["positions"], np.repeat(np.arange(len(heads)), size)
        self._tell(heads[tokens], keys.flatten(0, 1), values.flatten(0, 1), lambda: column[pages].flatten())

    # -- sweeps -------------------------------------------------------------------------------------------------

    def _sweep(self, sequences: Sequence[Seq]) -> None:
        """What does not stay leaves and the rest moves together; packed pages leave if none of their tokens stays."""
        view = self._view(sequences)
        stays = self._retention.stays(view)
        if stays.shape != view.used.shape or stays.dtype is not torch.bool:
            raise ValueError(f"{self._retention.name} told what stays as {tuple(stays.shape)} {stays.dtype}")
        stays = stays & view.used
        if not bool(stays.any(-1).all()):
            raise ValueError(f"{self._retention.name} lets every token of a head go: at least one must stay")
        if self._sealer is None:
            for i, sequence in enumerate(sequences):
                self._compact(sequence, stays[i], view.used[i])
            return
        rows, size = _rows(sequences), self._sealer.page_tokens
        width = self._packed_width(rows)
        some = stays[..., : width * size].reshape(*view.used.shape[:-1], width, size).any(-1).cpu().numpy()
        whole = np.arange(width) < (self._state.value_length[rows] // size)[..., None]
        gone = whole & ~some
        self._drop(sequences, gone & (gone.cumsum(-1) <= self._num_loose(rows)[..., None]))

    def _compact(self, sequence: Seq, stays: Tensor, used: Tensor) -> None:
        """Let go who does not stay [L, H, S]; the last that stay fill the holes, and pages left over are freed."""
        row, state = sequence.row, self._state
        assert row is not None
        gone = used & ~stays
        if not bool(gone.any()):
            return
        if self._heirs:
            self._leave_slots(*self._places(row, gone))
        num_kept = stays.sum(-1)
        in_front = torch.arange(stays.shape[-1], device=stays.device) < num_kept[..., None]
        # A head has as many holes among its first slots as it has tokens behind them.
        source, target = self._slots_at(row, stays & ~in_front), self._slots_at(row, in_front & ~stays)
        for column in (self._arena.keys, self._arena.values, *self._arena.columns.values()):
            self._kernels.move_slots(column, source, target)
        counts = num_kept.cpu().numpy().astype(np.int32)
        self._attest(sequence, int((state.used[row] - counts).sum()))
        state.used[row] = counts
        state.note_ends(np.array([row]))
        num_pages = np.minimum(-(-(counts + 1) // self._size), self._cache.page_table(row)[1])
        state.note_tables(row, self._cache.trim_pages(row, num_pages.astype(np.int64)))

    def _slots_at(self, row: int, which: Tensor) -> Tensor:
        """Slots (int64, page space) of the open slots that are true in [L, H, S], head by head."""
        layer, head, index = which.nonzero(as_tuple=True)
        return self._state.tables[row, layer, head, index // self._size].long() * self._size + index % self._size

    def _places(self, row: int, which: Tensor) -> tuple[Heads, Tensor]:
        layer, head, index = which.nonzero().T.cpu().numpy()
        heads = Heads(np.full_like(layer, row), layer, head)
        tokens: Ints = index + self._state.open_base[heads.place]
        return heads, self._state.open_slots(heads, tokens)

    # -- views --------------------------------------------------------------------------------------------------

    def _worth(self, view: DecodeView) -> Tensor:
        worth = self._retention.worth(view)
        if worth.shape != view.used.shape:
            raise ValueError(
                f"{self._retention.name} told the worth of slots as {tuple(worth.shape)}, not {tuple(view.used.shape)}"
            )
        return worth

    def _used(self, rows: Ints) -> tuple[Tensor, tuple[int, int]]:
        """Which slots hold tokens, bool [B, L, H, S], of so many packed and then open pages a head."""
        state = self._state
        counts = state.num_open[rows]
        num_open = max(1, int(-(-counts.max() // self._size)))
        index = torch.arange(num_open * self._size, dtype=torch.int32, device=state.device)
        if self._sealer is None:
            same = bool((counts == counts[:, :1, :1]).all())  # what heads of one length have in common is told once
            used = index < state.on_device(counts[:, :1, :1] if same else counts)[..., None]
            return used.expand(*counts.shape, -1), (0, num_open)
        width, lengths = self._packed_width(rows), state.on_device(state.key_length[rows])[..., None]
        sealed = torch.arange(width * self._sealer.page_tokens, device=state.device) < lengths
        first = lengths - state.on_device(state.open_base[rows])[..., None]
        used = (index < state.on_device(counts)[..., None]) & (index >= first)
        return torch.cat([sealed, used], -1), (width, num_open)

    def _num_packed_slots(self, rows: Ints) -> int:
        """Slots of a view that lie in packed pages; open ones follow."""
        return 0 if self._sealer is None else self._packed_width(rows) * self._sealer.page_tokens

    def _packed_width(self, rows: Ints) -> int:
        assert self._sealer is not None
        return max(1, int(-(-self._state.key_length[rows].max() // self._sealer.page_tokens)))

    def _view(self, sequences: Sequence[Seq]) -> DecodeView:
        """Tokens of these requests: packed ones first, then open slots."""
        rows, state = _rows(sequences), self._state
        index = state.on_device(rows)
        used, (num_packed, num_open) = self._used(rows)
        columns = _in_order(self._arena.columns, state.tables[index, ..., :num_open])
        if self._sealer is not None:
            sealed = _in_order(self._sealer.columns, state.packed[index, ..., :num_packed])
            columns = {name: torch.cat([sealed[name], column], -1) for name, column in columns.items()}
        return DecodeView(
            columns["positions"],
            columns.get("mass"),
            used,
            torch.tensor([s.num_computed for s in sequences], device=state.device),
            state.on_device(state.limit[rows]).long(),
            state.on_device(state.marks[rows]),
        )

    def kept_positions(self, sequence: Seq) -> list[list[list[int]]]:
        """Positions held by each layer and head, sorted; a victim whose slot is not yet written over has left."""
        row = sequence.row
        assert row is not None
        shape = self._state.used.shape[1:]
        if "positions" not in self._arena.columns:  # nothing is ever dropped
            return [[list(range(count)) for count in layer] for layer in self._state.used[row].tolist()]
        view = self._view([sequence])
        used = view.used[0].clone()
        first = self._num_packed_slots(np.array([row]))
        holes = np.argwhere(self._state.used[row] > self._state.most[row])
        for layer, head in holes.tolist():
            used[layer, head, first + self._state.write[row, layer, head]] = False
        positions = view.positions[0]
        return [
            [sorted(positions[layer, head][used[layer, head]].tolist()) for head in range(shape[1])]
            for layer in range(shape[0])
        ]

    def _attest(self, sequence: Seq, count: int) -> None:
        told, name = sequence.attestation, self._retention.name
        if self._demotes:
            told.tokens_demoted += count
        else:
            told.tokens_dropped += count
        told.did[name] = told.did.get(name, 0) + count


def _in_order(columns: Mapping[str, Tensor], tables: Tensor) -> dict[str, Tensor]:
    """Columns [P, size] by page tables int32 [..., N]: [..., N * size]."""
    pages, shape = tables.flatten(), (*tables.shape[:-1], -1)
    return {name: column.index_select(0, pages).view(shape) for name, column in columns.items()}


def _rows(sequences: Sequence[Seq]) -> Ints:
    return np.array([s.row for s in sequences], dtype=np.int64)
