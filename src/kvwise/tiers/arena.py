"""An arena: the K pages and V pages of one memory, and the columns that methods keep next to them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvwise.core.layout import KVLayout
from kvwise.tiers.memory import allocate

COLUMN_DTYPES = {"mass": torch.float32, "positions": torch.int32}


class Arena:
    """Bytes of `num_blocks` blocks of one layout in one memory.

    `keys` and `values` are [P, block_size, D]; a column is [P, block_size]. P = num_blocks * L * H, and page
    (block, layer, head) is number (block * L + layer) * H + head.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: Iterable[str] = (),
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        num_pages = num_blocks * layout.pages_per_block
        shape = (num_pages, layout.block_size, layout.head_dim)
        self.keys = allocate(shape, dtype, device)
        self.values = allocate(shape, dtype, device)
        self.columns: dict[str, Tensor] = {name: allocate(shape[:2], COLUMN_DTYPES[name], device) for name in columns}

    @property
    def num_bytes(self) -> int:
        """Bytes held, columns included."""
        return sum(t.nbytes for t in (self.keys, self.values, *self.columns.values()))

    def by_block(self, column: str) -> Tensor:
        """A column as [num_blocks, L * H, block_size]: all layers and heads of a token side by side."""
        return self.columns[column].view(self.num_blocks, -1, self.layout.block_size)


def block_bytes(layout: KVLayout, columns: Iterable[str] = ()) -> int:
    """Bytes one block takes in an arena with these columns."""
    column_bytes = sum(COLUMN_DTYPES[name].itemsize for name in columns)
    return layout.block_bytes + layout.pages_per_block * layout.block_size * column_bytes
