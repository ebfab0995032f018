"""Staging: device pages that fetched rows arrive in, laid out so that the kernels read them like any other pages."""

import torch
from torch import Tensor

from kvwise.core.layout import KVLayout


class Staging:
    """Pages [B, H, N] in a row: `keys` and `values` [B * H * N, block_size, D], `tables` int32 [B, H, N].

    The buffer only grows; a smaller batch uses its beginning.
    """

    def __init__(self, layout: KVLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        shape = (0, layout.block_size, layout.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.tables = torch.empty((0, layout.num_kv_heads, 0), dtype=torch.int32, device=device)

    def resize(self, num_sequences: int, num_pages: int) -> None:
        """Lay the buffer out for `num_sequences` sequences of `num_pages` pages a head."""
        heads = self._layout.num_kv_heads
        needed = num_sequences * heads * num_pages
        if needed > self._keys.shape[0]:
            self._keys = self._keys.new_empty((needed, *self._keys.shape[1:]))
            self._values = torch.empty_like(self._keys)
        pages = torch.arange(needed, dtype=torch.int32, device=self._keys.device)
        self.tables = pages.view(num_sequences, heads, num_pages)

    @property
    def keys(self) -> Tensor:
        """K pages [P, block_size, D]."""
        return self._keys

    @property
    def values(self) -> Tensor:
        """V pages [P, block_size, D]."""
        return self._values

    def first_slots(self) -> Tensor:
        """Slot int64 [B, H] where each head's rows begin."""
        return self.tables[..., 0].long() * self._layout.block_size

    @property
    def num_bytes(self) -> int:
        """Device bytes held."""
        return self._keys.nbytes + self._values.nbytes
