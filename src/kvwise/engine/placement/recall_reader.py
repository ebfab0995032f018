"""Reading: when a layer's rows are asked for, and what the index sees of prompts; written once for who reads a host."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvwise.engine.placement.recall_fetch import Asked, Fetch, Recall, begin_fetch
from kvwise.engine.sequence import Sequence as Seq
from kvwise.models.attention import AskAhead


class Reader:
    """What requests read of their host rows in one step, layer by layer; `asked` tells who reads in a layer.

    Rows come when a layer asks with its real query, or, where the step looks ahead, while the layer before runs.
    """

    def __init__(self, recall: Recall, asked: Callable[[int], Sequence[Asked]]) -> None:
        self._recall = recall
        self._asked = asked
        self._fetches: dict[int, Fetch] = {}

    def look_ahead(self, layer: int, ask: AskAhead, rows: slice) -> None:
        """Guess what the next layer will read for the queries in `rows`, and begin to fetch it."""
        following, recall = layer + 1, self._recall
        if following < recall.num_full_layers or following >= len(recall.layers):
            return
        if following in self._fetches:  # told twice: the hooks of another engine on the same model
            return
        asked = self._asked(following)
        if any(one.num_rows for one in asked):
            self._fetches[following] = begin_fetch(recall, following, asked, ask(following, rows))

    def arrived(self, layer: int, queries: Tensor, keys: Tensor) -> Fetch | None:
        """What the layer reads for queries [B, Hq, D], here by now; None if nobody has any rows.

        `keys` [B, H, D] are the queries' own, for the audit.
        """
        fetch = self._fetches.pop(layer, None)
        if fetch is None:
            asked = self._asked(layer)
            if not any(one.num_rows for one in asked):
                return None
            fetch = begin_fetch(self._recall, layer, asked, queries)
        fetch.wait()
        if self._recall.audit and layer >= self._recall.num_full_layers:
            self._audit(fetch, queries, keys)
        return fetch

    def _audit(self, fetch: Fetch, queries: Tensor, keys: Tensor) -> None:
        """Count how many of the tokens were fetched that the method would have named, had it known the true scores."""
        recall, facts, layout = self._recall, self._recall.layers[fetch.layer], self._recall.tiers.layout
        for i, (one, chosen) in enumerate(zip(fetch.asked, fetch.chosen, strict=True)):
            if not one.num_rows:
                continue
            stored = one.rows.keys(fetch.layer, one.num_rows)
            known = torch.cat([stored, keys[i].to(stored)[:, None]], dim=1).float()
            query = queries[i].float().cpu().reshape(layout.num_kv_heads, -1, layout.head_dim)
            scores = query @ known.transpose(-1, -2) * facts.scale
            if facts.softcap is not None:
                scores = facts.softcap * torch.tanh(scores / facts.softcap)
            best = recall.selection.best(scores, chosen.shape[1])
            hits = (best[..., :, None] == torch.from_numpy(chosen)[..., None, :]).any(-1)
            one.sequence.attestation.recall_hits += int(hits.sum())
            one.sequence.attestation.recall_total += hits.numel()


class PromptObserver:
    """Hands each sequence's rows of the flat batch to the index."""

    def __init__(self, recall: Recall, prefills: Sequence[tuple[Seq, int]]) -> None:
        self._recall = recall
        self._prefills = prefills

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Cut the flat batch into sequences."""
        if layer < self._recall.num_full_layers:
            return
        start = 0
        for sequence, num_tokens in self._prefills:
            assert sequence.row is not None
            rows = slice(start, start + num_tokens)
            try:
                self._recall.index.observe(layer, sequence.row, queries[rows], keys[rows])
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._recall.failures.setdefault(sequence, error)
            start += num_tokens
