"""The seam of encoding: how sealed tokens lie in their pages, and when open tokens are due to be sealed.

A request computes its prompt in the pool's own dtype. When its prefill has ended, and while it decodes, tokens that
are *due* leave their open pages for packed ones; the engine moves the bytes, methods say format and time. Keys and
values may be due at different times, values never before their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Axis, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvwise.kernels.packed import PageFormat


@dataclass(frozen=True, slots=True)
class EncodingShape:
    """What an encoding must know of model and pool: dims a head, the pool's dtype and block size, the model's files."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int
    model: str
    folder: Path | None


@dataclass(frozen=True, slots=True)
class ChannelView:
    """What of a prompt is seen when key channels are chosen.

    `queries(layer)` is float32 [H, G, W, D], the prompt's last W = `observed_rows` rotated queries; `keys(layer)` is
    float32 [H, T, D].
    """

    shape: tuple[int, int]  # L, H
    queries: Callable[[int], Tensor]
    keys: Callable[[int], Tensor]


@dataclass(frozen=True)
class Encoding(Method):
    """A method that decides in how many bytes the KV of a token lies."""

    axis: ClassVar[Axis] = Axis.ENCODING
    page_granular: ClassVar[bool] = True  # values are sealed in whole pages; False: token by token

    @property
    def upper_only(self) -> bool:
        """Whether split codes are read by their upper half alone (QuantSpec's draft)."""
        return False

    @property
    def observed_rows(self) -> int:
        """How many of the prompt's last queries `channels` must see."""
        return 0

    def page_format(self, shape: EncodingShape) -> PageFormat | None:
        """How a packed page lies in memory; None: nothing is ever packed."""
        return None

    def layer_map(self, shape: EncodingShape) -> tuple[int, ...]:
        """Whose KV each layer reads: its own, or that of an earlier layer, which then is all that is stored."""
        return tuple(range(shape.num_layers))

    def keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """Of heads with so many tokens whose keys are open, how many of the oldest to seal: int [..., L, H] to int64.

        L are the layers that store KV, which may differ. A multiple of the page's tokens, unless the format is `Plain`
        and the request is `settling` (its prefill has ended).
        """
        raise AssertionError(f"{self.name} packs nothing")

    def values_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """As `keys_due`, for values; any number where they are sealed token by token."""
        return self.keys_due(num_open, settling=settling)

    def channels(self, view: ChannelView) -> Tensor | None:
        """Which key channels are kept: int64 [L, H, dim], ascending; None: all."""
        return None
