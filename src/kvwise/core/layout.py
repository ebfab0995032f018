"""How the KV of a model is cut into blocks and pages, and which of its layers have any."""

from dataclasses import dataclass, field

from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Whose KV each layer of a model reads: its own, or that of an earlier layer, which alone is stored then.

    `reads[layer]` is that layer. The layers that store are numbered once more, in the same order: `storage[layer]` is
    where the KV that a layer reads lies. As text a map names the layers that store nothing and what they read:
    `3:1-5:2`, or `all` if every layer stores.
    """

    reads: tuple[int, ...]
    storage: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for layer, source in enumerate(self.reads):
            if not 0 <= source <= layer or self.reads[source] != source:
                raise UsageError(
                    f"layer {layer} cannot read layer {source}: only an earlier one that stores its own KV"
                )
        number = {layer: i for i, layer in enumerate(self.stored)}
        object.__setattr__(self, "storage", tuple(number[source] for source in self.reads))

    @classmethod
    def one_to_one(cls, num_layers: int) -> "LayerMap":
        """Every layer reads its own."""
        return cls(tuple(range(num_layers)))

    @property
    def stored(self) -> tuple[int, ...]:
        """The layers that store KV, in their order."""
        return tuple(sorted(set(self.reads)))

    def stores(self, layer: int) -> bool:
        """Whether a layer has KV of its own."""
        return self.reads[layer] == layer

    def __str__(self) -> str:
        shared = [f"{layer}:{source}" for layer, source in enumerate(self.reads) if layer != source]
        return "-".join(shared) or "all"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache of one model.

    A block is `block_size` consecutive tokens over all layers and KV heads. A page is the part of a block that
    belongs to one layer and one KV head. All pages live in one numbered space, so that a page freed by any head
    can serve any other: `page(block, layer, head) = (block * num_layers + layer) * num_kv_heads + head`.

    `num_layers` counts the layers that store KV; `layer_map` says which of the model's layers read them (None: there
    are no others, and each reads its own).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    element_bytes: int = 4
    layer_map: LayerMap | None = None

    def __post_init__(self) -> None:
        if self.layer_map is not None and len(self.layer_map.stored) != self.num_layers:
            raise UsageError(f"{self.num_layers} layers are to store KV, and of the map {self.layer_map} others do")

    @property
    def layers(self) -> LayerMap:
        """Which layer of the model reads which of these layers."""
        return self.layer_map or LayerMap.one_to_one(self.num_layers)

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
