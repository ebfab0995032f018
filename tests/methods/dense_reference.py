"""Dense attention that keeps its probabilities: what methods that rank tokens by attention are checked against."""

from typing import Any

import torch
from torch import Tensor

from kvwise.models.hook import forward


class Dense:
    """One sequence, full matrices. `weights[layer]` are the last step's probabilities [Hq, n, T]."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_tokens = 0
        self.weights: dict[int, Tensor] = {}

    def step(self, tokens: list[int]) -> Tensor:
        """More tokens -> logits [V] of the last."""
        positions = torch.arange(self._num_tokens, self._num_tokens + len(tokens))
        self._num_tokens += len(tokens)
        return forward(self._loaded, torch.tensor(tokens), positions, self, torch.tensor([len(tokens) - 1]))[0]

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        if layer in self._kv:
            keys, values = torch.cat([self._kv[layer][0], keys]), torch.cat([self._kv[layer][1], values])
        self._kv[layer] = keys, values
        group = queries.shape[1] // keys.shape[1]
        logits = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1)) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        logits = logits.masked_fill((distance < 0) | (distance >= (window or 10**9)), -torch.inf)
        weights = self.select(layer, logits).softmax(-1)
        self.weights[layer] = weights
        return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))

    def select(self, layer: int, logits: Tensor) -> Tensor:
        """Logits [Hq, n, T] with -inf where a method does not read; here it reads all."""
        return logits
