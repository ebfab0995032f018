"""An arena: the K pages and V pages of one memory, the columns that methods keep next to them, and packed pages."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvwise.core.layout import KVLayout
from kvwise.kernels.packed import PackedArena, PageFormat
from kvwise.tiers.memory import allocate


def dtype_of(column: str) -> torch.dtype:
    """What a column is made of: positions are whole numbers, all that methods keep are floats."""
    return torch.int32 if column == "positions" else torch.float32


class Arena:
    """Bytes of `num_blocks` blocks of one layout in one memory.

    `keys` and `values` are [P, block_size, D]; a column is [P, block_size]. P = num_blocks * L * H, and page
    (block, layer, head) is number (block * L + layer) * H + head. With a page format, `packed` is the same memory
    seen as packed pages, and `packed_columns` [packed pages, page_tokens] are the columns of their tokens.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: Iterable[str] = (),
        page_format: PageFormat | None = None,
    ) -> None:
        columns = list(columns)
        self.layout = layout
        self.num_blocks = num_blocks
        num_pages = num_blocks * layout.pages_per_block
        shape = (num_pages, layout.block_size, layout.head_dim)
        self.keys = allocate(shape, dtype, device)
        self.values = allocate(shape, dtype, device)
        self.columns: dict[str, Tensor] = {name: allocate(shape[:2], dtype_of(name), device) for name in columns}
        self.packed: PackedArena | None = None
        self.packed_columns: dict[str, Tensor] = {}
        if page_format is not None:
            halves = [half.view(num_blocks, -1).view(torch.uint8) for half in (self.keys, self.values)]
            self.packed = PackedArena((halves[0], halves[1]), page_format)
            shape = (self.packed.num_pages, page_format.page_tokens, 1)
            self.packed_columns = {name: allocate(shape[:2], dtype_of(name), device) for name in columns}

    @property
    def num_bytes(self) -> int:
        """Bytes held, columns included."""
        columns = (*self.columns.values(), *self.packed_columns.values())
        return sum(t.nbytes for t in (self.keys, self.values, *columns))

    def by_block(self, column: str) -> Tensor:
        """A column as [num_blocks, L * H, block_size]: all layers and heads of a token side by side."""
        return self.columns[column].view(self.num_blocks, -1, self.layout.block_size)


def block_bytes(layout: KVLayout, columns: Iterable[str] = (), page_format: PageFormat | None = None) -> int:
    """Bytes one block takes in an arena with these columns, also those of packed pages in this format."""
    column_bytes = sum(dtype_of(name).itemsize for name in columns)
    slots = layout.pages_per_block * layout.block_size
    if page_format is not None:
        slots += packed_per_block(layout, page_format) * page_format.page_tokens
    return layout.block_bytes + slots * column_bytes


def packed_per_block(layout: KVLayout, page_format: PageFormat) -> int:
    """Packed pages that the memory of one block holds: as many in its keys' half as in its values'."""
    return 2 * (layout.block_bytes // 2 // page_format.page_bytes)
