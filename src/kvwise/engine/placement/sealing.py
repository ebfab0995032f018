"""Sealing: tokens that are due leave their open pages for packed ones."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.page_state import Counts, Heads, Ints, PageState
from kvwise.kernels.base import Kernels, Sealed
from kvwise.kernels.packed import PackedArena, Plain
from kvwise.methods.encoding.base import Encoding
from kvwise.tiers.arena import Arena


class Sealer:
    """Carries out an encoding over a `PageState`.

    A token's columns lie beside its key: `columns` [packed pages, S] are those of tokens whose keys are packed.
    """

    def __init__(
        self, encoding: Encoding, cache: CacheManager, arena: Arena, kernels: Kernels, state: PageState
    ) -> None:
        assert arena.packed is not None
        self.packed: PackedArena = arena.packed
        self.page_tokens = self.packed.format.page_tokens
        self.columns: Mapping[str, Tensor] = arena.packed_columns
        self._encoding = encoding
        self._cache = cache
        self._arena = arena
        self._kernels = kernels
        self._state = state
        many = torch.full(state.used.shape[1:], 1 << 20)
        self.packs_output = np.asarray(encoding.keys_due(many, settling=False).numpy() > 0)  # bool [L, H]
        keys = self.packed.format.keys
        dim = keys.dim if isinstance(keys, Plain) and keys.dim < self.packed.format.head_dim else 0
        self._channels = torch.zeros((*state.used.shape, dim), dtype=torch.int32, device=state.device)

    def note_channels(self, row: int, channels: Tensor | None) -> None:
        """The key channels int64 [L, H, dim] that the row's packed keys keep."""
        if channels is not None:
            self._channels[row] = channels.to(torch.int32)

    # -- what is due --------------------------------------------------------------------------------------------

    def due(self, row: int, more: int = 0, *, settling: bool = False) -> tuple[Counts, Counts]:
        """Tokens [L, H] whose keys, and whose values, are to be sealed once `more` tokens have come."""
        state = self._state
        total = state.used[row] + more
        keys = self._encoding.keys_due(torch.from_numpy(total - state.key_length[row]), settling=settling).numpy()
        values = self._encoding.values_due(torch.from_numpy(total - state.value_length[row]), settling=settling)
        return keys.astype(np.int32), values.numpy().astype(np.int32)

    def pages_after(self, row: int, keys_due: Counts) -> Counts:
        """Packed pages [L, H] the row needs when these keys are sealed."""
        pages: Counts = -(-(self._state.key_length[row] + keys_due) // self.page_tokens)
        return pages

    def reserve(self, row: int, num_pages: Counts) -> bool:
        """Have at least so many packed pages; False, and nothing changed, if there is no room."""
        held = self._cache.packed_table(row)[1]
        if (num_pages <= held).all():
            return True
        tables = self._cache.grow_packed(row, np.maximum(num_pages, held).astype(np.int64))
        if tables is None:
            return False
        self._state.note_packed(row, tables)
        return True

    # -- sealing ------------------------------------------------------------------------------------------------

    def seal(self, heads: Heads, keys_due: Ints, values_due: Ints) -> None:
        """Seal the oldest open tokens of the heads [n]; their packed pages are reserved."""
        self._seal_keys(heads, keys_due)
        if self._encoding.page_granular:
            self._seal_value_pages(heads, values_due)
        else:
            self._seal_value_rows(heads, values_due)

    def _seal_keys(self, heads: Heads, due: Ints) -> None:
        state = self._state
        which, slots, pages = self._filled(heads, state.key_length[heads.place], due)
        if len(which):
            channels = None
            if self._channels.shape[-1]:
                rows, layers, places = (state.on_device(part) for part in which.place)
                channels = self._channels[rows, layers, places].long()
            self._kernels.seal_keys(self._arena.keys, slots, self.packed, pages, channels)
            for name, column in self.columns.items():
                column[pages] = self._arena.columns[name].view(-1)[slots]
        state.key_length[heads.place] += due.astype(np.int32)

    def _seal_value_pages(self, heads: Heads, due: Ints) -> None:
        state = self._state
        which, slots, pages = self._filled(heads, state.value_length[heads.place], due)
        if len(which):
            self._kernels.seal_values(self._arena.values, slots, self.packed, pages)
        state.value_length[heads.place] += due.astype(np.int32)

    def _filled(self, heads: Heads, first: Counts, due: Ints) -> tuple[Heads, Tensor, Tensor]:
        """Packed pages that the tokens `first`, ... of each head fill: whose they are, open slots [n, S], pages [n].

        Of a last page that stays part empty, the last slot is repeated.
        """
        state, size = self._state, self.page_tokens
        num_pages = -(-due // size)
        index, nth = np.repeat(np.arange(len(due)), num_pages), _places(num_pages)
        which = heads[index]
        start = first[index].astype(np.int64) + nth * size
        last = first[index].astype(np.int64) + due[index] - 1
        tokens = np.minimum(start[:, None] + np.arange(size), last[:, None])
        return which, state.open_slots(which, tokens), state.packed_slots(which, start, size) // size

    def _seal_value_rows(self, heads: Heads, due: Ints) -> None:
        state = self._state
        index = np.repeat(np.arange(len(heads)), due)
        if len(index):
            which = heads[index]
            tokens = state.value_length[which.place] + _places(due)
            self._kernels.seal_value_rows(
                self._arena.values,
                state.open_slots(which, tokens),
                self.packed,
                state.packed_slots(which, tokens, self.page_tokens),
            )
        state.value_length[heads.place] += due.astype(np.int32)

    # -- reading ------------------------------------------------------------------------------------------------

    def segments(self, rows: Ints, *, mass: bool) -> list[Sealed]:
        """Each layer's packed pages of these rows."""
        state = self._state
        index = state.on_device(rows)
        width = max(1, int(-(-state.key_length[rows].max(initial=0) // self.page_tokens)))
        tables = state.packed[index][..., :width].transpose(0, 1).contiguous()
        counts = [
            state.on_device(np.ascontiguousarray(part[rows].swapaxes(0, 1)))
            for part in (state.key_length, state.value_length, state.open_base)
        ]
        channels = self._channels[index].transpose(0, 1).contiguous() if self._channels.shape[-1] else None
        return [
            Sealed(
                self.packed,
                tables[layer],
                counts[0][layer],
                counts[1][layer],
                counts[2][layer],
                key_channels=None if channels is None else channels[layer],
                upper_only=self._encoding.upper_only,
                positions=self.columns.get("positions"),
                mass=self.columns.get("mass") if mass else None,
            )
            for layer in range(state.layout.num_layers)
        ]


def _places(counts: Ints) -> Ints:
    """0, 1, ... counts[0] - 1, then the same of the next."""
    ends = np.cumsum(counts)
    return np.asarray(np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts), dtype=np.int64)
