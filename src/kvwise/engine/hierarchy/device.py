"""Blocks of the device pool as tensors in CPU memory, for whoever writes them down or brings them back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise.core.layout import KVLayout
from kvwise.tiers.arena import Arena


class DeviceBlocks:
    """Reads and writes whole blocks of an arena, from any thread; who may touch which block is the caller's business.

    On a CPU nothing is copied: a block's pages lie one after another, so that its keys are a view [L, H, block_size,
    D] of the arena. On a GPU a block is copied over a stream of its own, beside the computation.
    """

    def __init__(self, arena: Arena) -> None:
        layout = arena.layout
        shape = (arena.num_blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.layout: KVLayout = layout
        self._keys = arena.keys.view(shape)
        self._values = arena.values.view(shape)
        self._stream = torch.cuda.Stream(arena.keys.device) if arena.keys.is_cuda else None  # type: ignore[no-untyped-call]

    def read(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Keys and values [n, L, H, block_size, D] in CPU memory, and which entries of them are `blocks`."""
        if self._stream is None:
            return self._keys, self._values, blocks
        index = torch.tensor(blocks, device=self._keys.device)
        with torch.cuda.stream(self._stream):
            keys, values = self._keys[index].cpu(), self._values[index].cpu()
        self._stream.synchronize()
        return keys, values, range(len(blocks))

    def target(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Where `blocks` are to be written, likewise; `write` then puts them into the arena."""
        if self._stream is None:
            return self._keys, self._values, blocks
        shape, dtype = (len(blocks), *self._keys.shape[1:]), self._keys.dtype
        keys = torch.empty(shape, dtype=dtype, pin_memory=True)
        return keys, torch.empty(shape, dtype=dtype, pin_memory=True), range(len(blocks))

    def write(self, blocks: Sequence[int], keys: Tensor, values: Tensor, layer: int | None = None) -> None:
        """Put what was written to a `target` into the arena: all layers, or one of them."""
        if self._stream is None:
            return
        index = torch.tensor(blocks, device=self._keys.device)
        with torch.cuda.stream(self._stream):
            for arena, source in ((self._keys, keys), (self._values, values)):
                if layer is None:
                    arena[index] = source.to(arena.device, non_blocking=True)
                else:
                    arena[index, layer] = source[:, layer].to(arena.device, non_blocking=True)
        self._stream.synchronize()

    def ready(self) -> None:
        """What the computation has written so far may be read from now on (a GPU runs behind the program)."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._keys.device))
