"""Top-k: every query reads the tokens it attends to most. A control: what any guess of them falls short of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.selection.base import Index, IndexShape, Selection, likeliest

if TYPE_CHECKING:
    from torch import Tensor

_ROOM = 64  # tokens by which an index grows


@dataclass(frozen=True)
class TopK(Selection):
    """Exact top-k attention: the ceiling of methods that guess which tokens a query needs.

    A layer's real query is scored against exact keys, and of the tokens before it the `budget` share (at least one)
    with the largest attention is fetched from the host, while the layer waits. Query heads that share a KV head add
    their probabilities. The keys of all tokens stay on the device to be scored: a measure of quality, not a way to
    save memory; the bytes that are fetched are those of any method with this budget. Rows that one of the last `keep`
    steps read are still on the device and are not fetched again.
    """

    budget: float = 0.2
    keep: int = 0

    name: ClassVar[str] = "topk"
    idea: ClassVar[str] = "keep all KV in host memory and fetch exactly what each query attends to most"
    paper: ClassVar[str] = "- (control)"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.RECALLS})
    looks_ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("keep", self.keep >= 0, "0 or more")

    @property
    def kept_steps(self) -> int:
        """As asked."""
        return self.keep

    def index(self, shape: IndexShape) -> TopKIndex:
        """The keys of every request."""
        return TopKIndex(self, shape)

    def best(self, scores: Tensor, num: int) -> Tensor:
        """The tokens with the largest probabilities, summed over the group."""
        return likeliest(scores, scores.shape[-1] - 1, num)


@dataclass(slots=True)
class _Keys:
    """The keys of one layer of one request, in the dtype they are stored in."""

    stored: Tensor  # [H, room, D]
    num_tokens: int


@dataclass(eq=False)
class TopKIndex(Index):
    """All keys per request and layer."""

    method: TopK
    shape: IndexShape
    rows: dict[int, dict[int, _Keys]] = field(default_factory=dict)

    def calibrate(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is learnt."""

    def observe(self, layer: int, row: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is noted: the keys come with `build`."""

    def fork(self, row: int, target: int) -> None:
        """Nothing was noted."""

    def build(self, layer: int, row: int, keys: Tensor) -> None:
        """Keep the keys."""
        self.rows.setdefault(row, {})[layer] = _Keys(keys.transpose(0, 1).contiguous(), keys.shape[0])

    def add(self, layer: int, row: int, keys: Tensor) -> None:
        """Keep one more, rounded as the stored one is."""
        held = self.rows[row][layer]
        if held.num_tokens == held.stored.shape[1]:
            held.stored = torch.nn.functional.pad(held.stored, (0, 0, 0, _ROOM))
        held.stored[:, held.num_tokens] = keys.to(held.stored.dtype)
        held.num_tokens += 1

    def choose(self, layer: int, row: int, query: Tensor, scale: float, num_tokens: int) -> Tensor:
        """The tokens with the largest attention."""
        held = self.rows[row][layer]
        keys = held.stored[:, : held.num_tokens].float()
        scores = query.float().reshape(self.shape.num_kv_heads, -1, self.shape.head_dim) @ keys.transpose(-1, -2)
        scores *= scale
        softcap = self.shape.softcaps[layer] if self.shape.softcaps else None
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return likeliest(scores, num_tokens, max(1, int(self.method.budget * num_tokens)))

    def drop(self, row: int) -> None:
        """Forget a request."""
        self.rows.pop(row, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys."""
        return sum(keys.stored.nbytes for layers in self.rows.values() for keys in layers.values())
