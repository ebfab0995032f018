"""One step of recall: which rows a layer reads, how they come from the host, and how the layer reads them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvwise.engine.placement.compact import block_slots
from kvwise.engine.placement.recall_tiers import RecallTiers
from kvwise.engine.placement.staging import Staging
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.methods.selection.base import Index, Selection
from kvwise.models.attention import AskAhead, LooksAhead
from kvwise.models.loaded import LayerAttention


@dataclass(frozen=True, slots=True)
class Recall:
    """What all steps of one engine share; `failures` are what the index raised in this step, by request."""

    selection: Selection
    index: Index
    tiers: RecallTiers
    layers: Sequence[LayerAttention]
    audit: bool = False
    failures: dict[Seq, Exception] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Rows on their way: when they have arrived, how many for each sequence [B], and which tokens they are."""

    arrival: Future[Staging]
    counts: Tensor
    chosen: list[Tensor]


class RecallPart(ABC):
    """Decoding sequences whose KV is on the host, with their host blocks (int64 [N] each).

    `tables` int32 [F, B, H, N] are the device pages of the layers that are read in full.
    """

    def __init__(
        self, recall: Recall, sequences: Sequence[Seq], rows: slice, host_blocks: list[Tensor], tables: Tensor
    ) -> None:
        self.rows = rows
        self._recall = recall
        self._sequences = sequences
        self._layout = recall.tiers.layout
        self._device = recall.tiers.device.keys.device
        self._positions = torch.tensor([s.num_computed for s in sequences], device=self._device)
        self._host_blocks = host_blocks
        self._query_start = torch.arange(len(sequences) + 1, dtype=torch.int32, device=self._device)
        self._tables = tables
        new = [torch.tensor([s.num_computed]) for s in sequences]
        size = self._layout.block_size
        self._new_slots = torch.cat([block_slots(b, t, size) for b, t in zip(host_blocks, new, strict=True)])

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """A full layer reads its device pages, any other its fetched rows and the new token."""
        if layer < self._recall.selection.num_full_layers:
            segment = self._full(layer, keys, values)
        else:
            segment = self._recalled(layer, queries, keys, values)
        found = self._recall.tiers.kernels.attend(
            queries, self._query_start, [segment], scale=scale, window=window, softcap=softcap
        )
        return found.out

    def _full(self, layer: int, keys: Tensor, values: Tensor) -> Segment:
        arena, size = self._recall.tiers.device, self._layout.block_size
        tables = self._tables[layer]
        page = tables.gather(-1, (self._positions // size)[:, None, None].expand(-1, tables.shape[1], 1))[..., 0]
        slots = page.long() * size + (self._positions % size)[:, None]
        self._recall.tiers.kernels.append(keys, values, arena.keys, arena.values, slots)
        lengths = (self._positions + 1).int()[:, None].expand(-1, tables.shape[1]).contiguous()
        return Segment(arena.keys, arena.values, tables, lengths, causal=False)

    def _recalled(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Segment:
        self._store_new(layer, keys, values)
        fetch = self._fetch(layer, queries)
        staging = fetch.arrival.result()
        if self._recall.audit:
            self._audit(layer, queries, fetch.chosen)
        ends = staging.first_slots() + fetch.counts[:, None]
        self._recall.tiers.kernels.append(keys, values, staging.keys, staging.values, ends)
        lengths = (fetch.counts + 1).int()[:, None].expand(-1, self._layout.num_kv_heads).contiguous()
        return Segment(staging.keys, staging.values, staging.tables, lengths, causal=False)

    def _store_new(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The new token's KV goes to the host and into the index."""
        self._recall.tiers.store_tokens(layer, keys, values, self._new_slots)
        for i, sequence in enumerate(self._sequences):
            assert sequence.row is not None
            try:
                self._recall.index.add(layer, sequence.row, keys[i])
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._recall.failures.setdefault(sequence, error)

    # -- choice and fetch ---------------------------------------------------------------------------------------

    @abstractmethod
    def _fetch(self, layer: int, queries: Tensor) -> _Fetch:
        """The rows that the layer reads for these queries [B, Hq, D], on their way or here."""

    def _begin(self, layer: int, queries: Tensor) -> _Fetch:
        """Ask the method what to read for queries [B, Hq, D], guessed or real, and begin to fetch it."""
        return self._begin_fetch(layer, [self._choose(layer, s, queries[i]) for i, s in enumerate(self._sequences)])

    def _choose(self, layer: int, sequence: Seq, query: Tensor) -> Tensor:
        """The tokens [H, n] the method names; if it fails, any one, and the request ends after the step."""
        recall, heads = self._recall, self._layout.num_kv_heads
        assert sequence.row is not None
        try:
            tokens = recall.index.choose(layer, sequence.row, query, recall.layers[layer].scale)
            known = bool(((tokens >= 0) & (tokens < sequence.num_computed)).all())
            if tokens.ndim != 2 or tokens.shape[0] != heads or tokens.shape[1] < 1 or not known:
                raise ValueError(f"{recall.selection.name} named tokens that the request does not have")
        except Exception as error:  # a method is somebody's code: it may raise anything
            recall.failures.setdefault(sequence, error)
            return torch.zeros((heads, 1), dtype=torch.int64, device=query.device)
        return tokens

    def _begin_fetch(self, layer: int, chosen: list[Tensor]) -> _Fetch:
        """One transfer for all sequences: where each chosen row lies on the host, and where it goes."""
        layout, size = self._layout, self._layout.block_size
        heads = torch.arange(layout.num_kv_heads)[:, None]
        counts = torch.tensor([c.shape[1] for c in chosen])
        num_pages = -(-(int(counts.max()) + 1) // size)
        slots, targets = [], []
        for i, tokens in enumerate(chosen):
            tokens = tokens.cpu()
            page = self._host_blocks[i][tokens // size] * layout.pages_per_block + layout.page_offset(layer) + heads
            slots.append((page * size + tokens % size).flatten())
            first = (i * layout.num_kv_heads + heads) * num_pages * size
            targets.append((first + torch.arange(tokens.shape[1])).flatten())
            self._attest(i, tokens)
        target = torch.cat(targets).to(self._device)
        arrival = self._recall.tiers.begin_fetch(layer, torch.cat(slots), target, (len(chosen), num_pages))
        return _Fetch(arrival, counts.to(self._device), chosen)

    def _attest(self, i: int, tokens: Tensor) -> None:
        attestation = self._sequences[i].attestation
        attestation.tokens_fetched += tokens.numel()
        attestation.fetch_candidates += tokens.shape[0] * self._sequences[i].num_computed
        attestation.bytes_fetched += tokens.numel() * self._recall.tiers.row_bytes
        name = self._recall.selection.name
        attestation.did[name] = attestation.did.get(name, 0) + tokens.numel()

    def _audit(self, layer: int, queries: Tensor, chosen: list[Tensor]) -> None:
        """Count how many of the tokens were fetched that the method would have named, had it known the true scores."""
        recall, facts = self._recall, self._recall.layers[layer]
        for i, sequence in enumerate(self._sequences):
            keys = recall.tiers.host_keys(layer, self._host_blocks[i], sequence.num_computed + 1).float()
            query = queries[i].float().cpu().reshape(self._layout.num_kv_heads, -1, self._layout.head_dim)
            scores = query @ keys.transpose(-1, -2) * facts.scale
            if facts.softcap is not None:
                scores = facts.softcap * torch.tanh(scores / facts.softcap)
            best = recall.selection.best(scores, chosen[i].shape[1])
            hits = (best[..., :, None] == chosen[i].cpu()[..., None, :]).any(-1)
            sequence.attestation.recall_hits += int(hits.sum())
            sequence.attestation.recall_total += hits.numel()


class OnDemandPart(RecallPart):
    """For methods that choose by a layer's real query: the layer waits while its rows are fetched."""

    def _fetch(self, layer: int, queries: Tensor) -> _Fetch:
        return self._begin(layer, queries)


class AheadPart(RecallPart, LooksAhead):
    """For methods that guess: the rows a layer reads are fetched while the layer before it runs."""

    def __init__(
        self, recall: Recall, sequences: Sequence[Seq], rows: slice, host_blocks: list[Tensor], tables: Tensor
    ) -> None:
        super().__init__(recall, sequences, rows, host_blocks, tables)
        self._fetches: dict[int, _Fetch] = {}

    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """Guess what the next layer will read, and begin to fetch it."""
        following = layer + 1
        if following < self._recall.selection.num_full_layers or following >= self._layout.num_layers:
            return
        if following not in self._fetches:  # else told twice: the hooks of another engine on the same model
            self._fetches[following] = self._begin(following, ask(following, self.rows))

    def _fetch(self, layer: int, queries: Tensor) -> _Fetch:
        return self._fetches.pop(layer)
