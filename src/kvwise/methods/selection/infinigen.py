"""InfiniGen: all KV lies in host memory; the few tokens a layer needs are guessed one layer ahead and fetched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.selection.base import Index, IndexShape, Selection, near

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InfiniGen(Selection):
    """InfiniGen, arXiv 2406.19707 sections 4.2-4.3.

    Queries and keys are skewed per head by the right singular vectors of sampled queries, which concentrates them in
    few columns; after prefill the `ratio` of columns with the largest |q| + |k| is kept as a partial key cache on the
    device. A layer's query, guessed from the previous layer's input, is scored against it: tokens within `alpha` of
    the best score are fetched, as many for each head as the mean over heads, at most `budget` of all tokens. Layer 0
    is read in full (its KV stays on the device), since nothing precedes it that could guess.

    With rotary positions the skew is applied after the rotation. The released code ranks columns by |q| alone and
    defaults to a ratio of 0.2. With grouped queries (not in the paper) a token counts as near for a KV head by the
    query head that wants it most. With prefix sharing |q| is summed over the computed rows only, so which columns are
    chosen depends on how much of the prompt was shared. Rows that one of the last `keep` steps read are still on the
    device and are not fetched again; the paper fetches all anew (0).
    """

    budget: float = 0.2
    alpha: float = 4.0
    ratio: float = 0.3
    keep: int = 0

    name: ClassVar[str] = "infinigen"
    idea: ClassVar[str] = "keep all KV in host memory and fetch what the next layer is guessed to need"
    paper: ClassVar[str] = "InfiniGen, arXiv 2406.19707"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.RECALLS})
    num_full_layers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("alpha", self.alpha >= 0, "0 or more")
        self.require("ratio", 0 < self.ratio <= 1, "above 0, at most 1")
        self.require("keep", self.keep >= 0, "0 or more")

    @property
    def kept_steps(self) -> int:
        """As asked."""
        return self.keep

    def index(self, shape: IndexShape) -> InfiniGenIndex:
        """Partial keys of every request, with the skews of the model."""
        return InfiniGenIndex(self, shape)


def skew(queries: Tensor) -> Tensor:
    """The rotation [H, D, D] whose columns are the right singular vectors of queries [H, N, D], strongest first."""
    right: Tensor = torch.linalg.svd(queries, full_matrices=False).Vh
    return right.transpose(-1, -2)


@dataclass(slots=True)
class _Partial:
    """One layer of one request: |q| summed over prompt rows, chosen columns, and the skewed keys in these columns."""

    query_weight: Tensor  # [H, D]
    columns: Tensor | None = None  # int64 [H, r]
    keys: Tensor | None = None  # [H, room, r]
    num_tokens: int = 0


@dataclass(eq=False)
class InfiniGenIndex(Index):
    """Skews [L, H, D, D] of the model, and a partial key cache per request and layer."""

    method: InfiniGen
    shape: IndexShape
    skews: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, dict[int, _Partial]] = field(default_factory=dict)

    def _grouped(self, queries: Tensor) -> Tensor:
        """[T, Hq, D] -> [H, T * G, D], float32."""
        num_tokens, _, head_dim = queries.shape
        grouped = queries.float().reshape(num_tokens, self.shape.num_kv_heads, -1, head_dim)
        return grouped.permute(1, 0, 2, 3).flatten(1, 2)

    def calibrate(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """The skew of a layer, per KV head, from the queries of all query heads that read it."""
        self.skews[layer] = skew(self._grouped(queries))

    def observe(self, layer: int, row: int, queries: Tensor, keys: Tensor) -> None:
        """Add up |q| in skewed space, column by column."""
        weight = (self._grouped(queries) @ self.skews[layer]).abs().sum(1)
        partials = self.rows.setdefault(row, {})
        if layer in partials:
            partials[layer].query_weight += weight
        else:
            partials[layer] = _Partial(weight)

    def fork(self, row: int, target: int) -> None:
        """Copy the sums of |q|."""
        self.rows[target] = {layer: _Partial(p.query_weight.clone()) for layer, p in self.rows[row].items()}

    def build(self, layer: int, row: int, keys: Tensor) -> None:
        """Choose the heaviest columns and keep the skewed keys in them."""
        partial = self.rows[row][layer]
        skewed = keys.float().transpose(0, 1) @ self.skews[layer]  # [H, T, D]
        weight = partial.query_weight + skewed.abs().sum(1)
        num_columns = max(1, round(self.method.ratio * self.shape.head_dim))
        partial.columns = weight.topk(num_columns, dim=-1).indices
        partial.keys = skewed.gather(-1, partial.columns[:, None, :].expand(-1, skewed.shape[1], -1))
        partial.num_tokens = keys.shape[0]

    def add(self, layer: int, row: int, keys: Tensor) -> None:
        """Skew one more token's keys [H, D] and keep their chosen columns."""
        partial = self.rows[row][layer]
        assert partial.keys is not None and partial.columns is not None
        if partial.num_tokens == partial.keys.shape[1]:
            partial.keys = torch.nn.functional.pad(partial.keys, (0, 0, 0, 64))
        skewed = (keys.float()[:, None, :] @ self.skews[layer])[:, 0]
        partial.keys[:, partial.num_tokens] = skewed.gather(-1, partial.columns)
        partial.num_tokens += 1

    def choose(self, layer: int, row: int, query: Tensor, scale: float, num_tokens: int) -> Tensor:
        """Tokens whose guessed score is within alpha of the best."""
        partial = self.rows[row][layer]
        assert partial.keys is not None and partial.columns is not None
        skewed = self._grouped(query[None]) @ self.skews[layer]  # [H, G, D]
        reduced = skewed.gather(-1, partial.columns[:, None, :].expand(-1, skewed.shape[1], -1))
        scores = reduced @ partial.keys[:, : partial.num_tokens].transpose(-1, -2) * scale
        most = max(1, int(self.method.budget * partial.num_tokens))
        return near(scores, self.method.alpha, most)

    def drop(self, row: int) -> None:
        """Forget a request."""
        self.rows.pop(row, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all partial keys; the skews belong to the model."""
        partials = (p for layers in self.rows.values() for p in layers.values())
        return sum(p.keys.nbytes for p in partials if p.keys is not None)
