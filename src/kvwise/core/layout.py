"""How the KV of a model is cut into blocks and pages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache of one model.

    A block is `block_size` consecutive tokens over all layers and KV heads. A page is the part of a block that
    belongs to one layer and one KV head. All pages live in one numbered space, so that a page freed by any head
    can serve any other: `page(block, layer, head) = (block * num_layers + layer) * num_kv_heads + head`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    element_bytes: int = 4

    @property
    def pages_per_block(self) -> int:
        """Pages in one block: one per layer and KV head."""
        return self.num_layers * self.num_kv_heads

    @property
    def page_bytes(self) -> int:
        """Bytes of K and V of one page."""
        return 2 * self.block_size * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of K and V of one block over all layers and heads."""
        return self.pages_per_block * self.page_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers and heads."""
        return self.block_bytes // self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def page_offset(self, layer: int) -> int:
        """First page of `layer` inside a block."""
        return layer * self.num_kv_heads
