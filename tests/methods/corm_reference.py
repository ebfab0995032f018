"""CORM written down plainly: one sequence, lists of what each head holds, one row after another."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel

SWEEP = 16  # the sweeps come when the number of tokens is a multiple of this


@dataclass
class Head:
    """What a KV head has kept; `marking_row` is the last row that found the token important, None if none did."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    marking_row: list[int | None] = field(default_factory=list)

    def sweep(self, num_tokens: int, window: int, recent: int) -> None:
        """Let go of what none of the last `window` rows marked and is not among the `recent` latest."""
        if len(self.positions) <= window + recent:
            return
        stays = [
            at >= num_tokens - recent or (row is not None and row >= num_tokens - window)
            for at, row in zip(self.positions, self.marking_row, strict=True)
        ]
        for name in ("positions", "keys", "values", "marking_row"):
            setattr(self, name, [x for x, stay in zip(getattr(self, name), stays, strict=True) if stay])


class PlainCorm:
    """Runs one sequence: `prefill`, then `decode` token by token. `margin` is the closest mark to its bound."""

    def __init__(self, loaded: LoadedModel, window: int, recent: int) -> None:
        self._loaded = loaded
        self._window, self._recent = window, recent
        self._heads = [[Head() for _ in range(loaded.num_kv_heads)] for _ in range(loaded.num_layers)]
        self._num_tokens = 0
        self._first_row = 0
        self.margin = math.inf

    def prefill(self, tokens: list[int]) -> Tensor:
        """All prompt tokens at once -> logits [V] of the last. Only the last `window` rows mark."""
        self._first_row = len(tokens) - self._window
        logits = self._forward(tokens)
        self._sweep()
        return logits

    def decode(self, token: int) -> Tensor:
        """One more token -> logits [V]."""
        logits = self._forward([token])
        if self._num_tokens % SWEEP == 0:
            self._sweep()
        return logits

    def kept(self) -> list[list[list[int]]]:
        """Positions by layer and head."""
        return [[list(head.positions) for head in layer] for layer in self._heads]

    def _sweep(self) -> None:
        for layer in self._heads:
            for head in layer:
                head.sweep(self._num_tokens, self._window, self._recent)

    def _forward(self, tokens: list[int]) -> Tensor:
        positions = torch.arange(self._num_tokens, self._num_tokens + len(tokens))
        logits = forward(self._loaded, torch.tensor(tokens), positions, self, torch.tensor([len(tokens) - 1]))
        self._num_tokens += len(tokens)
        return logits[0]

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(queries)
        group = queries.shape[1] // keys.shape[1]
        for h, head in enumerate(self._heads[layer]):
            for i in range(len(queries)):
                row = self._num_tokens + i
                head.positions.append(row)
                head.keys.append(keys[i, h])
                head.values.append(values[i, h])
                head.marking_row.append(None)
                weights = self._weights(head, queries[i, h * group : (h + 1) * group], row, scale, window, softcap)
                out[i, h * group : (h + 1) * group] = weights @ torch.stack(head.values)
                if row >= self._first_row:
                    self._mark(head, weights.mean(0).tolist(), row)
        return out

    def _weights(
        self, head: Head, queries: Tensor, row: int, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        logits = queries @ torch.stack(head.keys).T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = torch.tensor([row - at >= (window or 10**9) for at in head.positions])
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    def _mark(self, head: Head, attention: list[float], row: int) -> None:
        bound = 1 / len(attention)
        for i, received in enumerate(attention):
            if len(attention) > 1:
                self.margin = min(self.margin, abs(received - bound))
            if received >= bound:
                head.marking_row[i] = row
