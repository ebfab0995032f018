"""A plain attention behind the hook, for tests: dense KV per sequence and layer, nothing clever."""

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel


class DenseBatch:
    """Keeps all KV of a few sequences; each pass brings `counts[i]` new tokens of sequence `rows[i]`."""

    def __init__(self, num_sequences: int) -> None:
        self.cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.lengths = [0] * num_sequences
        self.rows: list[int] = []
        self.counts: list[int] = []
        self.queries: dict[int, Tensor] = {}

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self.queries[layer] = queries.clone()
        parts = zip(
            self.rows,
            queries.split(self.counts),
            keys.split(self.counts),
            values.split(self.counts),
            strict=True,
        )
        return torch.cat([self._one(layer, *part, scale, window, softcap) for part in parts])

    def _one(
        self,
        layer: int,
        row: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if (row, layer) in self.cache:
            old_k, old_v = self.cache[row, layer]
            k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
        self.cache[row, layer] = k, v
        groups = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, 1))

    def step(self, loaded: LoadedModel, tokens: dict[int, list[int]]) -> Tensor:
        """Runs the new tokens of some sequences in one flat pass -> logits [T, V] of all rows."""
        self.rows, self.counts = list(tokens), [len(new) for new in tokens.values()]
        positions = [self.lengths[row] + i for row, new in tokens.items() for i in range(len(new))]
        for row, new in tokens.items():
            self.lengths[row] += len(new)
        flat = torch.tensor([token for new in tokens.values() for token in new])
        return forward(loaded, flat, torch.tensor(positions), self, torch.arange(len(flat)))
