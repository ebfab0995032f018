"""H2O written down plainly from the paper (arXiv 2306.14048, local statistics): lists, loops and full matrices.

Nothing here knows of pages, slots or columns. One sequence; per layer and KV head a list of kept positions with
their keys, values and scores.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel


@dataclass
class Head:
    """What one KV head of one layer has kept."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def keep(self, indices: list[int]) -> None:
        for name in ("positions", "keys", "values", "scores"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])


class PlainH2O:
    """Runs one sequence: `prefill`, then `decode` token by token. `margin` is the closest decision there was."""

    def __init__(self, loaded: LoadedModel, budget: float, recent: float = 0.5, normalised: bool = False) -> None:
        self._loaded = loaded
        self._budget = budget
        self._recent_share = recent
        self._normalised = normalised
        self._heads = [[Head() for _ in range(loaded.num_kv_heads)] for _ in range(loaded.num_layers)]
        self._num_tokens = 0
        self.capacity = 0
        self.margin = float("inf")
        self.prompt_scores: list[list[list[float]]] = [[] for _ in range(loaded.num_layers)]

    def prefill(self, tokens: list[int]) -> Tensor:
        """All prompt tokens at once -> logits [V] of the last."""
        self.capacity = max(2, int(len(tokens) * self._budget))
        self.recent = max(1, int(self.capacity * self._recent_share))
        return self._forward(tokens)

    def decode(self, token: int) -> Tensor:
        """One more token -> logits [V]."""
        return self._forward([token])

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
            self._evict(head)
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

    def _evict(self, head: Head) -> None:
        """Prefill: keep the heavy hitters and the latest. Decoding: one in, one out."""
        while len(head.positions) > self.capacity:
            newest = max(head.positions)
            older = [i for i, p in enumerate(head.positions) if p <= newest - self.recent]
            scores = [self._rank(score, newest - p + 1) for score, p in zip(head.scores, head.positions, strict=True)]
            ranked = sorted(older, key=lambda i: scores[i])
            num_out = len(head.positions) - self.capacity
            out, stay = ranked[:num_out], ranked[num_out:]
            if stay:
                self.margin = min(self.margin, scores[stay[0]] - scores[out[-1]])
            head.keep([i for i in range(len(head.positions)) if i not in out])
