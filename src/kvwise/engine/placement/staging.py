"""Staging: device pages that fetched rows arrive in, which the kernels read like any other pages."""

from dataclasses import dataclass

import numpy as np
import torch

from kvwise.core.layout import KVLayout

Int64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Staged:
    """A layer's staging pages [H, N], and the transfers that fill their first `num_read` slots: int64 slots [n] each.

    `num_found` of the rows to read were on the device already.
    """

    pages: Int64
    num_read: int
    num_found: int
    move_from: Int64
    move_to: Int64
    fetch_from: Int64
    fetch_to: Int64


def nothing(num_heads: int) -> Staged:
    """What a request reads that has no rows yet."""
    none = np.zeros(0, dtype=np.int64)
    return Staged(np.zeros((num_heads, 0), dtype=np.int64), 0, 0, *[none] * 4)


class Staging:
    """Pages `keys` and `values` [P, block_size, D], lent out by number. It grows when all are lent."""

    def __init__(self, layout: KVLayout, dtype: torch.dtype, device: torch.device) -> None:
        shape = (0, layout.block_size, layout.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._free: Int64 = np.zeros(0, dtype=np.int64)

    @property
    def num_free(self) -> int:
        """Pages that can be lent without growing."""
        return len(self._free)

    def take(self, num_pages: int) -> Int64:
        """Pages [n] for their borrower alone. If it must grow, the arenas are others than before, of equal contents."""
        if num_pages > self.num_free:
            self._grow(num_pages - self.num_free)
        cut = self.num_free - num_pages
        taken, self._free = self._free[cut:], self._free[:cut]
        return taken

    def give(self, pages: Int64) -> None:
        """Take pages back."""
        self._free = np.concatenate([self._free, pages.ravel()])

    def clear(self) -> None:
        """Let the memory go if no page is lent."""
        if self.num_free == len(self.keys):
            self.keys, self.values = self.keys[:0].clone(), self.values[:0].clone()
            self._free = self._free[:0]

    def _grow(self, num_pages: int) -> None:
        have = len(self.keys)
        more = max(num_pages, have // 2)
        # Grown while the model runs, but written by a link's thread, to which its inference mode does not extend.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.cat([t, t.new_empty((more, *t.shape[1:]))]) for t in (self.keys, self.values)
            )  # fmt: skip
        self._free = np.concatenate([np.arange(have, have + more), self._free])

    @property
    def num_bytes(self) -> int:
        """Device bytes held."""
        return self.keys.nbytes + self.values.nbytes
