"""One step of recall: which rows a layer reads, how they come from the host, and how the layer reads them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise.engine.placement.compact import block_slots
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.recall_fetch import Asked, Fetch, begin_fetch
from kvwise.engine.placement.recall_fetch import Recall as Recall
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.models.attention import AskAhead, LooksAhead


class RecallPart(ABC):
    """Decoding sequences whose KV is on the host, in `host` rows.

    `tables` int32 [F, B, H, N] are the device pages of the layers that are read in full.
    """

    def __init__(
        self, recall: Recall, sequences: Sequence[Seq], rows: slice, host: list[HostRows], tables: Tensor
    ) -> None:
        self.rows = rows
        self._recall = recall
        self._sequences = sequences
        self._layout = recall.tiers.layout
        self._device = recall.tiers.device.keys.device
        self._positions = torch.tensor([s.num_computed for s in sequences], device=self._device)
        self._asked = [
            Asked(s, rows, s.num_computed, own=s.num_computed) for s, rows in zip(sequences, host, strict=True)
        ]
        self._query_start = torch.arange(len(sequences) + 1, dtype=torch.int32, device=self._device)
        self._tables = tables
        self._new_slots = torch.cat(
            [
                block_slots(torch.from_numpy(rows.blocks), torch.tensor([s.num_computed]), self._layout.block_size)
                for s, rows in zip(sequences, host, strict=True)
            ]
        )

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """A full layer reads its device pages, any other its fetched rows and the new token."""
        assert keys is not None and values is not None  # methods that recall are refused where layers share KV
        full = layer < self._recall.num_full_layers
        fetch = None if full else self._arrived(layer, queries, keys, values)
        segment = self._full(layer, keys, values) if fetch is None else fetch.segment(self._recall.tiers)
        found = self._recall.tiers.kernels.attend(
            queries, self._query_start, [segment], scale=scale, window=window, softcap=softcap
        )
        if fetch is not None:
            fetch.done()
        return found.out

    def _full(self, layer: int, keys: Tensor, values: Tensor) -> Segment:
        arena, size = self._recall.tiers.device, self._layout.block_size
        tables = self._tables[layer]
        page = tables.gather(-1, (self._positions // size)[:, None, None].expand(-1, tables.shape[1], 1))[..., 0]
        slots = page.long() * size + (self._positions % size)[:, None]
        self._recall.tiers.kernels.append(keys, values, arena.keys, arena.values, slots)
        lengths = (self._positions + 1).int()[:, None].expand(-1, tables.shape[1]).contiguous()
        return Segment(arena.keys, arena.values, tables, lengths, causal=False)

    def _arrived(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Fetch:
        """What the layer reads of its rows, here, with the new token behind it."""
        self._store_new(layer, keys, values)
        fetch = self._fetch(layer, queries)
        fetch.wait()
        self._follow_order(layer)
        if self._recall.audit:
            self._audit(layer, queries, fetch)
        staging = self._recall.tiers.staging
        slots = fetch.own_slots(self._layout.block_size).to(self._device)
        self._recall.tiers.kernels.append(keys, values, staging.keys, staging.values, slots)
        return fetch

    def _store_new(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The new token's KV goes to the host and into the index."""
        self._recall.tiers.store_tokens(layer, keys, values, self._new_slots)
        for i, sequence in enumerate(self._sequences):
            assert sequence.row is not None
            try:
                self._recall.index.add(layer, sequence.row, keys[i])
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._recall.failures.setdefault(sequence, error)

    def _follow_order(self, layer: int) -> None:
        """What the index has ordered anew moves on the host, now that nothing of this layer is on its way."""
        for one in self._asked:
            assert one.sequence.row is not None
            try:
                self._recall.follow_order(layer, one.sequence.row, one.rows)
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._recall.failures.setdefault(one.sequence, error)

    @abstractmethod
    def _fetch(self, layer: int, queries: Tensor) -> Fetch:
        """The rows that the layer reads for these queries [B, Hq, D], on their way or here."""

    def _begin(self, layer: int, queries: Tensor) -> Fetch:
        return begin_fetch(self._recall, layer, self._asked, queries)

    def _audit(self, layer: int, queries: Tensor, fetch: Fetch) -> None:
        """Count how many of the tokens were fetched that the method would have named, had it known the true scores."""
        recall, facts = self._recall, self._recall.layers[layer]
        for i, (one, chosen) in enumerate(zip(self._asked, fetch.chosen, strict=True)):
            keys = one.rows.keys(layer, one.num_rows + 1).float()
            query = queries[i].float().cpu().reshape(self._layout.num_kv_heads, -1, self._layout.head_dim)
            scores = query @ keys.transpose(-1, -2) * facts.scale
            if facts.softcap is not None:
                scores = facts.softcap * torch.tanh(scores / facts.softcap)
            best = recall.selection.best(scores, chosen.shape[1])
            hits = (best[..., :, None] == torch.from_numpy(chosen)[..., None, :]).any(-1)
            one.sequence.attestation.recall_hits += int(hits.sum())
            one.sequence.attestation.recall_total += hits.numel()


class OnDemandPart(RecallPart):
    """For methods that choose by a layer's real query: the layer waits while its rows are fetched."""

    def _fetch(self, layer: int, queries: Tensor) -> Fetch:
        return self._begin(layer, queries)


class AheadPart(RecallPart, LooksAhead):
    """For methods that guess: the rows a layer reads are fetched while the layer before it runs."""

    def __init__(
        self, recall: Recall, sequences: Sequence[Seq], rows: slice, host: list[HostRows], tables: Tensor
    ) -> None:
        super().__init__(recall, sequences, rows, host, tables)
        self._fetches: dict[int, Fetch] = {}

    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """Guess what the next layer will read, and begin to fetch it."""
        following = layer + 1
        if following < self._recall.num_full_layers or following >= self._layout.num_layers:
            return
        if following not in self._fetches:  # else told twice: the hooks of another engine on the same model
            self._fetches[following] = self._begin(following, ask(following, self.rows))

    def _fetch(self, layer: int, queries: Tensor) -> Fetch:
        return self._fetches.pop(layer)
