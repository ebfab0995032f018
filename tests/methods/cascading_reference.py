"""Cascading KV Cache written down plainly from the paper (arXiv 2406.17808) and its card: lists and loops.

Nothing here knows of pages, slots, rings or frames. Tokens are entries in lists, oldest first; keys are kept as they
are before any rotation, and rotated by their place among the kept tokens (or their position in the text) whenever they
are read. One sequence; the model is run at position 0 throughout, so that its own rotation does nothing.
"""

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel


@dataclass
class Entry:
    """One token in one head."""

    position: int
    key: Tensor = field(default_factory=lambda: torch.zeros(0))
    value: Tensor = field(default_factory=lambda: torch.zeros(0))
    score: float = 0.0


@dataclass
class Rules:
    """The options; `sizes` of the buffers, the first first."""

    sinks: int
    sizes: tuple[int, ...]
    beta: float = 0.9999
    cache_positions: bool = True
    homogeneous: bool = True
    eager_fill: bool = True
    released: bool = False


class Head:
    """What one head keeps. `margin` is how close the closest comparison was, as a share of the scores."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.sinks: list[Entry] = []
        self.buffers: list[list[Entry]] = [[] for _ in rules.sizes]
        self.margin = float("inf")

    def entries(self) -> list[Entry]:
        """In the order of the cache: the oldest buffer first."""
        return [*self.sinks, *chain.from_iterable(reversed(self.buffers))]

    def insert(self, entry: Entry) -> None:
        """Token number `entry.position` comes."""
        rules, number = self.rules, entry.position
        if len(self.sinks) < rules.sinks:
            self.sinks.append(entry)
            return
        for i, (buffer, size) in enumerate(zip(self.buffers, rules.sizes, strict=True)):
            accepts = (number - rules.sinks) % 2**i == 0
            if rules.eager_fill and number - rules.sinks < sum(rules.sizes):
                accepts = True
            if accepts and len(buffer) < size:
                buffer.append(entry)
                return
            if accepts:
                buffer.append(entry)
                entry = buffer.pop(0)
            elif not buffer:
                buffer.append(entry)
                return
            else:
                rival = buffer[0] if rules.released else buffer[-1]
                gap = abs(entry.score - rival.score) / max(entry.score, rival.score, 1e-30)
                self.margin = min(self.margin, gap)
                if entry.score >= rival.score:
                    buffer[-1] = entry
                return


class PlainCascading:
    """Runs one sequence: `prefill`, then `decode` token by token."""

    def __init__(self, loaded: LoadedModel, rules: Rules, stride: int) -> None:
        self._loaded = loaded
        self._rules = rules
        self._stride = stride
        self._heads = [[Head(rules) for _ in range(loaded.num_kv_heads)] for _ in range(loaded.num_layers)]
        self._num_tokens = 0
        config = loaded.config
        theta = 10000.0
        dim = loaded.head_dim
        if getattr(config, "rope_parameters", None):
            theta = config.rope_parameters["rope_theta"]
            dim = int(dim * config.rope_parameters.get("partial_rotary_factor", 1))
        self._freq = theta ** (-torch.arange(0, dim, 2).double() / dim)

    def prefill(self, tokens: list[int]) -> Tensor:
        """Stride by stride -> logits [V] of the last token."""
        for start in range(0, len(tokens), self._stride):
            logits = self._forward(tokens[start : start + self._stride])
        return logits

    def decode(self, token: int) -> Tensor:
        """One more token -> logits [V]."""
        return self._forward([token])

    def kept(self) -> list[list[list[int]]]:
        """Positions by layer and head, sorted."""
        return [[sorted(e.position for e in head.entries()) for head in layer] for layer in self._heads]

    @property
    def margin(self) -> float:
        """The closest comparison of all heads."""
        return min(head.margin for layer in self._heads for head in layer)

    def _forward(self, tokens: list[int]) -> Tensor:
        places = torch.zeros(len(tokens), dtype=torch.int64)
        if not self._rules.cache_positions and not getattr(self._loaded.config, "rope_parameters", None):
            places = torch.arange(self._num_tokens, self._num_tokens + len(tokens))  # learned: the model adds them
        logits = forward(self._loaded, torch.tensor(tokens), places, self, torch.tensor([len(tokens) - 1]))
        self._num_tokens += len(tokens)
        return logits[0]

    def _rotated(self, rows: Tensor, places: list[int]) -> Tensor:
        if not getattr(self._loaded.config, "rope_parameters", None):
            return rows
        half = len(self._freq)
        angle = torch.tensor(places).double()[:, None] * self._freq
        x, y = rows[:, :half].double(), rows[:, half : 2 * half].double()
        turned = torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 1)
        return torch.cat([turned.to(rows.dtype), rows[:, 2 * half :]], 1)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        num_new, num_heads = keys.shape[:2]
        group = queries.shape[1] // num_heads
        out = torch.empty_like(queries)
        held, received = [], []
        for h in range(num_heads):
            entries = self._heads[layer][h].entries()
            num_old = len(entries)
            entries += [Entry(self._num_tokens + i, keys[i, h], values[i, h]) for i in range(num_new)]
            places = list(range(len(entries))) if self._rules.cache_positions else [e.position for e in entries]
            k = self._rotated(torch.stack([e.key for e in entries]), places)
            v = torch.stack([e.value for e in entries])
            hidden = torch.ones(num_new, len(entries), dtype=torch.bool).triu(num_old + 1)
            each = []
            for g in range(h * group, (h + 1) * group):
                scores = self._rotated(queries[:, g], places[num_old:]) @ k.T * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                out[:, g] = weights @ v
                each.append(weights.double())
            held.append(entries)
            received.append(torch.stack(each).mean(0))
        if self._rules.homogeneous:
            received = [torch.stack(received).mean(0)] * num_heads
        for head, entries, rows in zip(self._heads[layer], held, received, strict=True):
            for row in rows.tolist():
                for entry, a in zip(entries, row, strict=True):
                    entry.score = self._rules.beta * entry.score + (1 - self._rules.beta) * a
            for entry in entries[len(entries) - num_new :]:
                head.insert(entry)
        return out
