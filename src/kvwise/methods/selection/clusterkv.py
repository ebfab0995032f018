"""ClusterKV: keys that point the same way are one cluster, and a query reads the clusters it points at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.selection.base import Index, IndexShape, Selection, likeliest, voted
from kvwise.methods.selection.kmeans import kmeans

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_PER_CLUSTER = 80  # of a prompt: the paper's C0 = L / 80
_ROOM = 64  # tokens by which a window grows


@dataclass(frozen=True)
class ClusterKV(Selection):
    """ClusterKV, arXiv 2412.03213 section III.

    After prefill the keys of each layer and KV head, but the first `sink`, are clustered by k-means (`kmeans.py`); on
    the host a cluster is one run of rows. A query reads the sinks, then clusters in the order of q . centroid, the
    last one cut off, until the budget is full, and every token since the prompt. Of these, each `update` that have
    gathered become `new_clusters` clusters and are read like the prompt's from then on. The budget is the share
    `budget` of the tokens in clusters and sinks, and at most `tokens` (the paper's 512 to 2,048; it sets no share).
    Layers 0 and 1 are read in full and stay on the device. Rows read by one of the last `keep` steps are still there
    and are not fetched again.

    `nlist` clusters of the prompt (released code: 400, or 200 when it measures speed) are, unless given, one for 80
    tokens, and at least `new_clusters`. Of a budget under twice `sink` tokens, sinks get half. With grouped queries
    (the paper has none) the group's heads add their probabilities over the centroids. The released code runs k-means
    by distance and only assigns by cosine; the paper does both by cosine.
    """

    budget: float = 0.2
    tokens: int | None = None
    sink: int = 16
    nlist: int | None = None
    iterations: int = 20
    update: int = 320
    new_clusters: int = 8
    keep: int = 1
    seed: int = 0

    name: ClassVar[str] = "clusterkv"
    idea: ClassVar[str] = "keep all KV in host memory and fetch the clusters of keys that a query points at"
    paper: ClassVar[str] = "ClusterKV, arXiv 2412.03213"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.RECALLS})
    num_full_layers: ClassVar[int] = 2
    looks_ahead: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        for option in ("tokens", "nlist"):
            self.require(option, getattr(self, option) is None or getattr(self, option) >= 1, "at least 1")
        for option in ("iterations", "update", "new_clusters"):
            self.require(option, getattr(self, option) >= 1, "at least 1")
        for option in ("sink", "keep", "seed"):
            self.require(option, getattr(self, option) >= 0, "0 or more")

    @property
    def kept_steps(self) -> int:
        """As asked."""
        return self.keep

    def index(self, shape: IndexShape) -> ClusterIndex:
        """Clusters of every request."""
        return ClusterIndex(self, shape)

    def best(self, scores: Tensor, num: int) -> Tensor:
        """The tokens with the largest probabilities, summed over the group."""
        return likeliest(scores, scores.shape[-1] - 1, num)

    def most(self, num_tokens: int) -> int:
        """How many of so many tokens in clusters and sinks a query reads."""
        share = max(1, int(self.budget * num_tokens))
        return share if self.tokens is None else min(share, self.tokens)


@dataclass(slots=True)
class _Clusters:
    """One layer of one request: C clusters of M tokens, behind `sink` others and before a window of new ones."""

    sink: int
    centroids: Tensor  # float32 [H, C, D]
    sizes: Tensor  # int32 [H, C]
    members: Tensor  # int32 [H, M]: tokens, cluster by cluster
    window: Tensor  # [H, room, D]: keys of tokens since
    num_window: int = 0

    @property
    def num_indexed(self) -> int:
        """Tokens in clusters and sinks."""
        return self.sink + self.members.shape[1]


@dataclass(eq=False)
class ClusterIndex(Index):
    """Centroids, members, and the keys of the newest tokens, per request and layer."""

    method: ClusterKV
    shape: IndexShape
    rows: dict[int, dict[int, _Clusters]] = field(default_factory=dict)

    def calibrate(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is learnt."""

    def observe(self, layer: int, row: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is noted: the keys come with `build`."""

    def fork(self, row: int, target: int) -> None:
        """Nothing was noted."""

    def build(self, layer: int, row: int, keys: Tensor) -> None:
        """Cluster the prompt's keys."""
        num_tokens, num_heads, dim = keys.shape
        sink = min(self.method.sink, self.method.most(num_tokens) // 2)
        num = self.method.nlist or max(self.method.new_clusters, num_tokens // TOKENS_PER_CLUSTER)
        none = keys.new_empty((num_heads, 0), dtype=torch.int32)
        window = keys.new_empty((num_heads, 0, dim))
        found = _Clusters(sink, window.float(), none, none, window)
        self._cluster(found, keys[sink:].transpose(0, 1), num)
        self.rows.setdefault(row, {})[layer] = found

    def _cluster(self, found: _Clusters, keys: Tensor, num: int) -> None:
        """The next tokens, with keys [H, T, D], become `num` clusters."""
        centroids, labels = kmeans(keys, num, self.method.iterations, self.method.seed)
        sizes = torch.zeros(centroids.shape[:2], dtype=torch.int32, device=keys.device)
        sizes.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int32))
        members = labels.argsort(dim=-1, stable=True).int() + found.num_indexed
        found.centroids = torch.cat([found.centroids, centroids], dim=1)
        found.sizes = torch.cat([found.sizes, sizes], dim=1)
        found.members = torch.cat([found.members, members], dim=1)

    def add(self, layer: int, row: int, keys: Tensor) -> None:
        """One more token since the prompt; a full window becomes clusters first."""
        found = self.rows[row][layer]
        if found.num_window == self.method.update:
            self._cluster(found, found.window[:, : found.num_window], self.method.new_clusters)
            found.num_window = 0
        if found.num_window == found.window.shape[1]:
            found.window = torch.nn.functional.pad(found.window, (0, 0, 0, _ROOM))
        found.window[:, found.num_window] = keys.to(found.window.dtype)
        found.num_window += 1

    def order(self, layer: int, row: int, first: int) -> Tensor | None:
        """Sinks, then cluster by cluster."""
        found = self.rows[row][layer]
        if found.num_indexed <= first:
            return None
        sinks = torch.arange(found.sink, device=found.members.device).expand(len(found.members), -1)
        return torch.cat([sinks, found.members.long()], dim=1)[:, first:]

    def choose(self, layer: int, row: int, query: Tensor, scale: float, num_tokens: int) -> Tensor:
        """Sinks, the clusters with the best centroids, and the tokens since."""
        found = self.rows[row][layer]
        grouped = query.float().reshape(self.shape.num_kv_heads, -1, self.shape.head_dim)
        scores = voted(grouped @ found.centroids.transpose(-1, -2) * scale)
        ranking = scores.argsort(dim=-1, descending=True, stable=True)
        clustered = _fill(ranking, found.sizes.long(), found.members, self.method.most(found.num_indexed) - found.sink)
        around = [torch.arange(found.sink), torch.arange(found.num_indexed, num_tokens)]
        sinks, window = (tokens.to(query.device).expand(len(ranking), -1) for tokens in around)
        return torch.cat([sinks, clustered, window], dim=1)

    def drop(self, row: int) -> None:
        """Forget a request."""
        self.rows.pop(row, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all clusters and windows."""
        each = (c for layers in self.rows.values() for c in layers.values())
        return sum(t.nbytes for c in each for t in (c.centroids, c.sizes, c.members, c.window))


def _fill(ranking: Tensor, sizes: Tensor, members: Tensor, room: int) -> Tensor:
    """The first `room` tokens int64 [H, room] of clusters of `sizes` [H, C] taken in the order of `ranking` [H, C]."""
    taken = sizes.gather(1, ranking)
    ends = taken.cumsum(-1)
    place = torch.arange(room, device=sizes.device).expand(len(sizes), -1).contiguous()
    which = torch.searchsorted(ends, place, right=True)  # an empty cluster ends where the one before it does
    starts = sizes.cumsum(-1) - sizes
    first = (starts.gather(1, ranking) - (ends - taken)).gather(1, which)
    return members.gather(1, first + place).long()
