"""What encodings that pack have in common: the first layers may stay native, and nothing else is packed there."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvwise.methods.encoding.base import Encoding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packing(Encoding):
    """An encoding that packs all layers but the first `native_layers`, which keep the pool's dtype for good.

    Early layers are the ones that quantisation hurts most, and what is wrong in them reaches all others.
    """

    native_layers: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self.require("native_layers", self.native_layers >= 0, "0 (none) or more")

    def keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """See Encoding; nothing in native layers."""
        return self._where_packed(self._keys_due(num_open.long(), settling=settling))

    def values_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """See Encoding; nothing in native layers."""
        return self._where_packed(self._values_due(num_open.long(), settling=settling))

    @abstractmethod
    def _keys_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """`keys_due` of packed layers; `num_open` is int64."""

    def _values_due(self, num_open: Tensor, *, settling: bool) -> Tensor:
        """`values_due` of packed layers; `num_open` is int64."""
        return self._keys_due(num_open, settling=settling)

    def _where_packed(self, due: Tensor) -> Tensor:
        if self.native_layers:
            due[..., : self.native_layers, :] = 0
        return due
