"""ClusterKV and Quest once more, one head at a time in float64 numpy and plain loops, and on a dense model."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvwise.methods.selection.clusterkv import ClusterKV
from kvwise.methods.selection.quest import Quest
from tests.methods.dense_reference import Dense

Array = np.ndarray[Any, np.dtype[np.float64]]


def together(scores: Array) -> Array:
    """The group's heads add their probabilities; scores [G, C]."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).sum(0)


def plain_kmeans(keys: Array, num: int, iterations: int, seed: int) -> tuple[Array, list[list[int]]]:
    """Centroids [C, D] and each one's keys; assigned by cosine, moved to the mean."""
    drawn = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[:num].numpy()
    centroids = keys[drawn]

    def assign() -> list[list[int]]:
        lengths = np.linalg.norm(keys, axis=1)[:, None] * np.linalg.norm(centroids, axis=1)
        nearest = np.argmax(keys @ centroids.T / lengths, axis=1)
        return [np.flatnonzero(nearest == c).tolist() for c in range(len(centroids))]

    clusters = assign()
    for _ in range(iterations):
        centroids = np.array([keys[c].mean(0) if c else old for c, old in zip(clusters, centroids, strict=True)])
        before, clusters = clusters, assign()
        if clusters == before:
            break
    return centroids, clusters


class Reference(Protocol):
    """One head of one layer of one request."""

    def add(self, key: Array) -> None: ...

    def choose(self, queries: Array) -> list[int]: ...


class ReferenceClusterKV:
    """SYSTEMS card 5.2, with the budget as a share of the tokens that are in clusters or sinks."""

    def __init__(self, method: ClusterKV, keys: Array) -> None:
        self.method = method
        self.keys = list(keys)
        self.num_indexed = len(keys)
        self.sink = min(method.sink, self._most() // 2)
        num = method.nlist or max(method.new_clusters, len(keys) // 80)
        self.centroids, clusters = plain_kmeans(keys[self.sink :], num, method.iterations, method.seed)
        self.clusters = [[i + self.sink for i in c] for c in clusters]

    def _most(self) -> int:
        share = max(1, int(self.method.budget * self.num_indexed))
        return min(share, self.method.tokens or share)

    def add(self, key: Array) -> None:
        if len(self.keys) - self.num_indexed == self.method.update:
            window = np.array(self.keys[self.num_indexed :])
            centroids, clusters = plain_kmeans(
                window, self.method.new_clusters, self.method.iterations, self.method.seed
            )
            self.centroids = np.concatenate([self.centroids, centroids])
            self.clusters += [[i + self.num_indexed for i in c] for c in clusters]
            self.num_indexed = len(self.keys)
        self.keys.append(key)

    def choose(self, queries: Array) -> list[int]:
        room = self._most() - self.sink
        chosen: list[int] = []
        for cluster in np.argsort(-together(queries @ self.centroids.T)):
            chosen += self.clusters[cluster][: room - len(chosen)]
        return [*range(self.sink), *chosen, *range(self.num_indexed, len(self.keys) - 1)]


class ReferenceQuest:
    """Page bounds by loops over the pages' keys."""

    def __init__(self, method: Quest, keys: Array) -> None:
        self.method = method
        self.keys = list(keys)

    def add(self, key: Array) -> None:
        self.keys.append(key)

    def choose(self, queries: Array) -> list[int]:
        size, before = self.method.page, self.keys[:-1]
        most = max(1, int(self.method.budget * len(before)))
        full = len(before) // size
        newest = list(range(full * size, len(before)))[-most:]
        bounds = np.zeros((len(queries), full))
        for page in range(full):
            keys = np.array(before[page * size : (page + 1) * size])
            bounds[:, page] = np.maximum(queries * keys.min(0), queries * keys.max(0)).sum(-1)
        chosen: list[int] = []
        for page in np.argsort(-together(bounds)) if full else []:
            chosen += list(range(page * size, (page + 1) * size))[: most - len(newest) - len(chosen)]
        return chosen + newest


class DenseReading(Dense):
    """While decoding, every layer and KV head behind the first reads what a reference names, and its own token."""

    def __init__(self, loaded: Any, make: Callable[[Array], Reference], num_full_layers: int = 2) -> None:
        super().__init__(loaded)
        self._make = make
        self._num_full_layers = num_full_layers
        self._heads: dict[tuple[int, int], Reference] = {}
        self._asking: Tensor = torch.empty(0)
        self.chosen: dict[int, list[list[int]]] = {}  # the last step's, by layer and head

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Tensor:
        self._asking = queries * more["scale"]
        return super().attend(layer, queries, keys, values, **more)

    def select(self, layer: int, logits: Tensor) -> Tensor:
        keys = self._kv[layer][0].double().numpy()  # [T, H, D]
        num_heads = keys.shape[1]
        if logits.shape[1] > 1:
            self._heads |= {(layer, h): self._make(keys[:, h]) for h in range(num_heads)}
            return logits
        if layer < self._num_full_layers:
            return logits
        queries = self._asking[0].double().numpy().reshape(num_heads, -1, keys.shape[2])
        hidden = torch.ones(num_heads, logits.shape[-1], dtype=torch.bool)
        self.chosen[layer] = []
        for h in range(num_heads):
            self._heads[layer, h].add(keys[-1, h])
            self.chosen[layer].append(self._heads[layer, h].choose(queries[h]))
            hidden[h, self.chosen[layer][h]] = False
        hidden[:, -1] = False
        return logits.masked_fill(hidden.repeat_interleave(len(logits) // num_heads, 0)[:, None], -torch.inf)
