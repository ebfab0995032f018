"""What settled requests may need of the pool: told before one is queued, so that nothing waits for ever."""

import torch

from kvwise.methods.encoding.base import Encoding
from kvwise.methods.retention.base import Retention
from kvwise.tiers.arena import Arena


class PageRoom:
    """Reckons for a retention method and, where pages are packed, an encoding."""

    def __init__(self, retention: Retention, encoding: Encoding, arena: Arena) -> None:
        self._retention = retention
        self._encoding = None if arena.packed is None else encoding
        self._arena = arena
        self._size = arena.layout.block_size
        self._shape = (arena.layout.num_layers, arena.layout.num_kv_heads)
        self._page_tokens = 1 if arena.packed is None else arena.packed.format.page_tokens
        self._packed_per_block = 1 if arena.packed is None else 2 * arena.packed.per_half

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The pool must hold all a head may ever keep, and the token being added (a window can outgrow the prompt)."""
        layout = self._arena.layout
        most = self._most(num_prompt, num_tokens)
        if self._num_blocks(most) <= self._arena.num_blocks:
            return self._room_to_pack(num_prompt, min(most, num_prompt + 1))
        return (
            f"{self._retention} keeps up to {most} tokens of a prompt of {num_prompt} tokens and its output, and the "
            f"pool holds {self._arena.num_blocks * layout.block_size}: raise kv_cache_memory_bytes or keep fewer"
        )

    def _room_to_pack(self, num_prompt: int, num_kept: int) -> str | None:
        """Layers are packed one by one, and what the last one leaves frees the blocks that all of them lay in."""
        layout = self._arena.layout
        num_blocks = layout.num_blocks_for(num_kept) + self._num_broken(num_kept)[0]
        if self._encoding is None or num_blocks <= self._arena.num_blocks:
            return None
        return (
            f"{self._encoding} needs {num_blocks * layout.block_size} tokens of KV while it packs a prompt of "
            f"{num_prompt} tokens, and the pool holds {self._arena.num_blocks * layout.block_size}: "
            "raise kv_cache_memory_bytes"
        )

    def _num_blocks(self, num_tokens: int) -> int:
        """Whole blocks whose memory `num_tokens` tokens a head take, packed as far as they are due."""
        return sum(self._num_broken(num_tokens))

    def _num_broken(self, num_tokens: int) -> tuple[int, int]:
        """Likewise: blocks of packed pages, and of open ones."""
        layout = self._arena.layout
        if self._encoding is None:
            return 0, layout.num_blocks_for(num_tokens)
        count = torch.full(self._shape, num_tokens)
        keys = self._encoding.keys_due(count, settling=True)
        values = self._encoding.values_due(count, settling=True)
        num_packed = int((-(-keys // self._page_tokens)).sum())
        num_open = int((-(-(count - values + self._size) // self._size)).sum())
        return -(-num_packed // self._packed_per_block), -(-num_open // layout.pages_per_block)

    def _most(self, num_prompt: int, num_tokens: int) -> int:
        """Slots a head of a request of `num_prompt` tokens that may grow to `num_tokens` can need at once."""
        capacity = self._retention.capacity(num_prompt)
        if capacity is None:
            return num_tokens
        if self._retention.grows:
            return min(capacity, num_prompt) + num_tokens - num_prompt
        return min(capacity, num_tokens) + 1
