"""Observed rows: the queries of a prompt's last rows, kept until its prefill ends, and the attention they pay."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvwise.engine.sequence import Sequence as Seq
from kvwise.models.loaded import LayerAttention


class ObservedQueries:
    """Remembers, for each sequence in prefill, the rotated queries of the prompt rows that a method asks for.

    `num_rows` tells how many of a sequence's last prompt rows. They are remembered as they are computed, in whatever
    chunks; rows of the output (of a request that was preempted) are not among them.
    """

    def __init__(self, num_rows: Callable[[Seq], int]) -> None:
        self._num_rows = num_rows
        self._chunks: dict[Seq, dict[int, list[Tensor]]] = {}

    def observe(self, prefills: Sequence[tuple[Seq, int]], layer: int, queries: Tensor) -> None:
        """See the queries [T, Hq, D] of a step's prompt tokens; `prefills` are (sequence, tokens) in their order."""
        start = 0
        for sequence, num_tokens in prefills:
            first = sequence.num_computed
            wanted = max(0, sequence.num_prompt - self._num_rows(sequence))
            begin, end = max(wanted, first), min(sequence.num_prompt, first + num_tokens)
            if begin < end:
                rows = queries[start + begin - first : start + end - first].detach().clone()
                self._chunks.setdefault(sequence, {}).setdefault(layer, []).append(rows)
            start += num_tokens

    def queries(self, sequence: Seq, layer: int, num_rows: int) -> Tensor:
        """The last `num_rows` observed queries of a layer: float32 [W, Hq, D]."""
        found = torch.cat(self._chunks[sequence][layer]).float()
        return found[found.shape[0] - num_rows :]

    def fork(self, source: Seq, sibling: Seq) -> None:
        """`sibling` has the same prompt."""
        if source in self._chunks:
            self._chunks[sibling] = self._chunks[source]

    def forget(self, sequence: Seq) -> None:
        """Drop what is remembered of a sequence; one that is not known is no error."""
        self._chunks.pop(sequence, None)


def attention_rows(queries: Tensor, keys: Tensor, first_row: int, facts: LayerAttention) -> Tensor:
    """Causal attention of rows at positions `first_row`, `first_row` + 1, ... over keys at positions 0, 1, ...

    queries [W, Hq, D] and keys [H, T, D], both rotated, float32 -> probabilities [H, G, W, T], as the layer's own
    attention has them (scale, softcap, window).
    """
    num_rows, num_heads = queries.shape[0], keys.shape[0]
    grouped = queries.view(num_rows, num_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)  # [H, G, W, D]
    scores = grouped @ keys.transpose(-1, -2)[:, None] * facts.scale
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    row = torch.arange(first_row, first_row + num_rows, device=keys.device)[:, None]
    distance = row - torch.arange(keys.shape[1], device=keys.device)
    hidden = distance < 0
    if facts.window is not None:
        hidden |= distance >= facts.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)
