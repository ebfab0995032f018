"""H2O written down plainly from the paper (arXiv 2306.14048, local statistics): lists, loops and full matrices.

Nothing here knows of pages, slots or columns. One sequence; per layer and KV head a list of kept positions with
their keys, values and scores.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel
from tests.methods.budgets_reference import plain_heads, plain_layers, plain_margin


@dataclass
class Head:
    """What one KV head of one layer has kept."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    limit: int = 0  # as many as the prompt's end left it

    def keep(self, indices: list[int]) -> None:
        for name in ("positions", "keys", "values", "scores"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])


class PlainH2O:
    """Runs one sequence: `prefill`, then `decode` token by token. `margin` is the closest decision there was."""

    def __init__(
        self, loaded: LoadedModel, budget: float, recent: float = 0.5, normalised: bool = False,
        layers: str = "uniform", heads: str = "uniform",
    ) -> None:  # fmt: skip
        self._loaded = loaded
        self._budget = budget
        self._recent_share = recent
        self._normalised = normalised
        self._by_layer, self._by_head = layers, heads
        self._heads = [[Head() for _ in range(loaded.num_kv_heads)] for _ in range(loaded.num_layers)]
        self._num_tokens = 0
        self.capacity = 0
        self.margin = float("inf")
        self.prompt_scores: list[list[list[float]]] = [[] for _ in range(loaded.num_layers)]

    def prefill(self, tokens: list[int]) -> Tensor:
        """All prompt tokens at once -> logits [V] of the last."""
        self.capacity = max(2, int(len(tokens) * self._budget))
        self.recent = max(1, int(self.capacity * self._recent_share))
        logits = self._forward(tokens)
        numbers = plain_layers(self._by_layer, self.capacity - self.recent, len(tokens) - self.recent, len(self._heads))
        for layer, number in zip(self._heads, numbers, strict=True):
            self._choose(layer, number)
        return logits

    def decode(self, token: int) -> Tensor:
        """One more token -> logits [V]."""
        logits = self._forward([token])
        for layer in self._heads:
            for head in layer:
                self._evict(head)
        return logits

    def kept(self) -> list[list[list[int]]]:
        """Positions by layer and head, sorted."""
        return [[sorted(head.positions) for head in layer] for layer in self._heads]

    def _forward(self, tokens: list[int]) -> Tensor:
        positions = torch.arange(self._num_tokens, self._num_tokens + len(tokens))
        logits = forward(self._loaded, torch.tensor(tokens), positions, self, torch.tensor([len(tokens) - 1]))
        self._num_tokens += len(tokens)
        return logits[0]

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        num_new, num_heads = keys.shape[:2]
        group = queries.shape[1] // num_heads
        out = torch.empty_like(queries)
        for h in range(num_heads):
            head = self._heads[layer][h]
            head.positions += range(self._num_tokens, self._num_tokens + num_new)
            head.keys += list(keys[:, h])
            head.values += list(values[:, h])
            head.scores += [0.0] * num_new
            k, v, at = torch.stack(head.keys), torch.stack(head.values), torch.tensor(head.positions)
            for g in range(h * group, (h + 1) * group):
                weights = self._weights(queries[:, g], k, at, scale, window, softcap)
                out[:, g] = weights @ v
                received = weights.double().sum(0).tolist()
                head.scores = [s + r for s, r in zip(head.scores, received, strict=True)]
            if num_new > 1:
                self.prompt_scores[layer].append(head.scores)
        return out

    def _weights(
        self, query: Tensor, keys: Tensor, at: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        logits = query @ keys.T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        own = torch.arange(self._num_tokens, self._num_tokens + len(query))
        distance = own[:, None] - at
        hidden = (distance < 0) | (distance >= (window or 10**9))
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    def _rank(self, score: float, num_rows: int) -> float:
        """The sum of the attention from `num_rows` rows, or its mean."""
        return score / num_rows if self._normalised else score

    def _ranks(self, head: Head) -> list[float]:
        newest = max(head.positions)
        return [self._rank(score, newest - p + 1) for score, p in zip(head.scores, head.positions, strict=True)]

    def _choose(self, layer: list[Head], num_heavy: int) -> None:
        """The prompt has ended: the heads of a layer keep their heavy hitters and the latest."""
        older = len(layer[0].positions) - self.recent
        scores = [self._ranks(head)[:older] for head in layer]
        if len(layer[0].positions) > self.capacity:
            self.margin = min(self.margin, plain_margin(self._by_head, scores, num_heavy))
        for head, heavy in zip(layer, plain_heads(self._by_head, scores, num_heavy), strict=True):
            head.limit = len(heavy) + self.recent
            head.keep([i for i in range(len(head.positions)) if i in heavy or i >= older])

    def _evict(self, head: Head) -> None:
        """One in, one out."""
        if len(head.positions) <= head.limit:
            return
        newest = max(head.positions)
        older = [i for i, p in enumerate(head.positions) if p <= newest - self.recent]
        scores = self._ranks(head)
        out, *stay = sorted(older, key=lambda i: scores[i])
        if stay:
            self.margin = min(self.margin, scores[stay[0]] - scores[out])
        head.keep([i for i in range(len(head.positions)) if i != out])
