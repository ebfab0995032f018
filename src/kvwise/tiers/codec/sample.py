"""Sample blocks: what codecs with distributions of their own learn from."""

from collections.abc import Callable

from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout

Sample = Callable[[], tuple[Tensor, Tensor]]  # keys, values [n, L, H, block_size, D] of whole blocks, in CPU memory


def check_sample(name: str, layout: KVLayout, keys: Tensor, values: Tensor) -> None:
    """UsageError unless these are blocks of this layout."""
    wanted = (layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
    for tensor in (keys, values):
        if tensor.ndim != 5 or not len(tensor) or tuple(tensor.shape[1:]) != wanted:
            raise UsageError(f"{name}: sample blocks {tuple(tensor.shape)} are not [n, {', '.join(map(str, wanted))}]")


def check_shape(name: str, num_layers: int | None, keys: Tensor) -> None:
    """ValueError for a block of another number of layers than the tables are for (None: any)."""
    if num_layers is not None and len(keys) != num_layers:
        raise ValueError(f"{name}: a block of {len(keys)} layers, but the tables are for {num_layers}")
