"""Compaction: slots that stay move to the front of their head's pages."""

import torch
from torch import Tensor

from kvwise.kernels.base import Kernels
from kvwise.tiers.arena import Arena


def compact(arena: Arena, kernels: Kernels, kept: Tensor, blocks: Tensor, tables: Tensor) -> None:
    """Move the kept tokens of a sequence from its blocks to its pages, columns and all.

    kept: bool [L, H, T]; blocks: int64 [N], the sequence's block table; tables: int32 [L, H, M], its page tables,
    where page i of a head may be the very page of block i. Tokens move in order and never to a later place, so no
    source is overwritten before it is read.
    """
    layout = arena.layout
    size = layout.block_size
    layer, head, token = kept.nonzero(as_tuple=True)
    rank = (kept.cumsum(-1) - 1)[layer, head, token]
    page = blocks[token // size] * layout.pages_per_block + layer * layout.num_kv_heads + head
    source = page * size + token % size
    target = tables[layer, head, rank // size].long() * size + rank % size
    moved = source != target
    source, target = source[moved], target[moved]
    for column in (arena.keys, arena.values, *arena.columns.values()):
        kernels.move_slots(column, source, target)


def slots_of(tables: Tensor, index: Tensor, block_size: int) -> Tensor:
    """Slots (int64, page space) of the slot indices `index` [...] in page tables [..., M]."""
    page = tables.gather(-1, (index // block_size)[..., None].long())[..., 0].long()
    return page * block_size + index.long() % block_size


def block_slots(blocks: Tensor, tokens: Tensor, block_size: int) -> Tensor:
    """Slots (int64, block * block_size + offset) of positions `tokens` in a block table [N]."""
    return blocks[tokens // block_size] * block_size + torch.remainder(tokens, block_size)
