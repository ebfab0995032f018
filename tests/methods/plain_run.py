"""One sequence on a model, its KV in lists: what references of merging and folding methods are run on.

Nothing here knows of pages, slots or columns. A rule rearranges the lists when the prompt has been read, and after
every further token; it may also change what a query is answered.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel


@dataclass
class Head:
    """What one KV head of one layer holds: a list of tokens, oldest first, and the attention each has received."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def take(self, index: int) -> tuple[Tensor, Tensor]:
        """Remove the token at `index`; its key and value."""
        del self.positions[index], self.scores[index]
        return self.keys.pop(index), self.values.pop(index)


class Rule(Protocol):
    """A method, written down plainly."""

    margin: float  # the closest decision there was

    def settle(self, layers: list[list[Head]]) -> None:
        """The prompt has been read."""

    def after(self, layers: list[list[Head]]) -> None:
        """One more token has been read."""

    def answer(self, layer: int, query_head: int, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """What a query [D] gets that attention over the list answers with `out` [D]."""


class PlainRun:
    """Runs one sequence under a rule: all of the prompt at once, then token by token."""

    def __init__(self, loaded: LoadedModel, rule: Rule) -> None:
        self._loaded = loaded
        self._rule = rule
        self.layers = [[Head() for _ in range(loaded.num_kv_heads)] for _ in range(loaded.num_layers)]
        self._num_tokens = 0

    def read(self, tokens: list[int]) -> Tensor:
        """Logits [V] behind the prompt, or behind one more token."""
        first = self._num_tokens
        place = torch.arange(first, first + len(tokens))
        logits = forward(self._loaded, torch.tensor(tokens), place, self, torch.tensor([len(tokens) - 1]))[0]
        self._num_tokens += len(tokens)
        (self._rule.after if first else self._rule.settle)(self.layers)
        return logits

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        first, num_heads = self._num_tokens, keys.shape[1]
        group = queries.shape[1] // num_heads
        out = torch.empty_like(queries)
        for h, head in enumerate(self.layers[layer]):
            head.positions += range(first, first + len(keys))
            head.keys += list(keys[:, h].clone())
            head.values += list(values[:, h].clone())
            head.scores += [0.0] * len(keys)
            k, v, at = torch.stack(head.keys), torch.stack(head.values), torch.tensor(head.positions)
            distance = torch.arange(first, first + len(keys))[:, None] - at
            hidden = (distance < 0) | (distance >= (window or 10**9))
            for q in range(h * group, (h + 1) * group):
                logits = queries[:, q] @ k.T * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits.masked_fill(hidden, -torch.inf)
                weights = logits.softmax(-1)
                out[:, q] = weights @ v
                received = weights.double().sum(0).tolist()
                head.scores = [s + r for s, r in zip(head.scores, received, strict=True)]
                if first:
                    out[0, q] = self._rule.answer(layer, q, queries[0, q], out[0, q], logits[0].logsumexp(-1))
        return out


def held(engine: Any, sequence: Any) -> list[list[Head]]:
    """What an engine holds of a settled sequence, read from its pages, oldest first."""
    placement, arena = engine.memory.placement, engine.memory.arena
    state, row, size = placement._state, sequence.row, engine.memory.layout.block_size
    layers = []
    for layer, kept in enumerate(placement.kept_positions(sequence)):
        heads = []
        for h, positions in enumerate(kept):
            slots = [
                (int(state.tables[row, layer, h, i // size]), i % size) for i in range(int(state.used[row, layer, h]))
            ]
            at = {int(arena.columns["positions"][slot]): slot for slot in slots}
            heads.append(
                Head(positions, [arena.keys[at[p]] for p in positions], [arena.values[at[p]] for p in positions])
            )
        layers.append(heads)
    return layers


def require_same(ours: list[list[Head]], theirs: list[list[Head]], where: str = "") -> None:
    """The same tokens at every layer and head, with the same keys and values but for rounding."""
    mine_all, plain_all = ([head for layer in layers for head in layer] for layers in (ours, theirs))
    assert [head.positions for head in mine_all] == [head.positions for head in plain_all], where
    for mine, plain in zip(mine_all, plain_all, strict=True):
        for rows, expected in ((mine.keys, plain.keys), (mine.values, plain.values)):
            torch.testing.assert_close(torch.stack(rows), torch.stack(expected), atol=2e-4, rtol=1e-4)
