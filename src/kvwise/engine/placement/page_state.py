"""Where the tokens of settled requests lie: page tables and counts by row, layer and head."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvwise.core.layout import KVLayout

Counts = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
UNLIMITED = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Heads:
    """Some (row, layer, head) triples, int64 [n] each."""

    rows: Ints
    layers: Ints
    heads: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Ints) -> "Heads":
        return Heads(self.rows[index], self.layers[index], self.heads[index])

    @property
    def place(self) -> tuple[Ints, Ints, Ints]:
        """Index into arrays [R, L, H]."""
        return self.rows, self.layers, self.heads


class PageState:
    """Batched over the cache manager's rows R. A head numbers its tokens in table order: packed ones, then open ones.

    On the host, int32 [R, L, H]: `used` tokens (a victim that the next token will overwrite is still one), `limit`, the
    `most` that are held before each new one takes a victim's place (the limit, unless tokens leave by whole pages),
    `key_length` and `value_length` tokens whose keys and values are packed, `open_base` the token in open slot 0,
    `write` the open slot of the next token; and `marks` float32 [R, L, H].
    On the device: page tables int32 [R, L, H, N] of open and [R, L, H, M] of packed pages.
    """

    def __init__(self, layout: KVLayout, max_rows: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        shape = (max_rows, layout.num_layers, layout.num_kv_heads)
        self.used: Counts = np.zeros(shape, np.int32)
        self.limit: Counts = np.zeros(shape, np.int32)
        self.most: Counts = np.zeros(shape, np.int32)
        self.key_length: Counts = np.zeros(shape, np.int32)
        self.value_length: Counts = np.zeros(shape, np.int32)
        self.open_base: Counts = np.zeros(shape, np.int32)
        self.write: Counts = np.zeros(shape, np.int32)
        self.marks: npt.NDArray[np.float32] = np.zeros(shape, np.float32)
        self.tables = torch.zeros((*shape, 1), dtype=torch.int32, device=device)
        self.packed = torch.zeros((*shape, 1), dtype=torch.int32, device=device)

    def start(self, row: int, used: Counts, limit: Counts) -> None:
        """A request has settled: `used` tokens [L, H] in open pages, nothing packed."""
        self.used[row] = used
        self.limit[row] = self.most[row] = limit
        self.key_length[row] = self.value_length[row] = self.open_base[row] = 0
        self.marks[row] = 0
        self.note_ends(np.array([row]))

    def note_tables(self, row: int, tables: Counts) -> None:
        """The row's open pages are `tables` [L, H, N]."""
        self.tables = _noted(self.tables, row, tables)

    def note_packed(self, row: int, tables: Counts) -> None:
        """The row's packed pages are `tables` [L, H, M]."""
        self.packed = _noted(self.packed, row, tables)

    def note_ends(self, rows: Ints) -> None:
        """The next token of every head of these rows goes behind its last one."""
        self.write[rows] = self.used[rows] - self.open_base[rows]

    @property
    def num_open(self) -> Counts:
        """Open slots in use [R, L, H]."""
        return np.asarray(self.used - self.open_base)

    def on_device(self, array: Counts | Ints | npt.NDArray[np.bool_] | npt.NDArray[np.float32]) -> Tensor:
        """The array as a tensor on the pool's device."""
        return torch.from_numpy(array).to(self.device)

    def all_heads(self, rows: Ints) -> Heads:
        """Every head of these rows, in order."""
        num_layers, num_heads = self.used.shape[1:]
        places = np.stack(np.meshgrid(rows, np.arange(num_layers), np.arange(num_heads), indexing="ij"))
        return Heads(*places.reshape(3, -1).astype(np.int64))

    def open_slots(self, heads: Heads, tokens: Ints) -> Tensor:
        """Slots (int64, page space) of open tokens int64 [n, ...] of the heads [n]."""
        base = self.open_base[heads.place].reshape(-1, *(1,) * (tokens.ndim - 1))
        return self._slots(self.tables, heads, tokens - base, self.layout.block_size)

    def packed_slots(self, heads: Heads, tokens: Ints, page_tokens: int) -> Tensor:
        """Packed slots (page * page_tokens + row) of packed tokens int64 [n, ...]."""
        return self._slots(self.packed, heads, tokens, page_tokens)

    def _slots(self, tables: Tensor, heads: Heads, index: Ints, size: int) -> Tensor:
        first = np.ravel_multi_index(heads.place, self.used.shape) * tables.shape[-1]
        entry, offset = np.divmod(index.astype(np.int64), size)
        entry += first.reshape(-1, *(1,) * (index.ndim - 1))
        return tables.view(-1)[self.on_device(entry)].long() * size + self.on_device(offset)


def _noted(held: Tensor, row: int, tables: Counts) -> Tensor:
    width = tables.shape[-1]
    if width > held.shape[-1]:
        grown = held.new_zeros((*held.shape[:-1], width + width // 4))
        grown[..., : held.shape[-1]] = held
        held = grown
    held[row, ..., :width] = torch.from_numpy(tables).to(held.device)
    return held
