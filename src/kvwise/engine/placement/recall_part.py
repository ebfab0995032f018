"""One step of recall: what is fetched a layer ahead, and how a layer reads it."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvwise.engine.placement.compact import block_slots
from kvwise.engine.placement.staging import Staging
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.methods.selection.base import near
from kvwise.models.attention import AskAhead, LooksAhead

if TYPE_CHECKING:
    from kvwise.engine.placement.recall import RecallPlacement


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Rows on their way: when they have arrived, how many for each sequence [B], and which tokens they are."""

    arrival: Future[Staging]
    counts: Tensor
    chosen: list[Tensor]


class RecallPart(LooksAhead):
    """Decoding sequences whose KV is on the host: the rows a layer reads are fetched one layer ahead."""

    def __init__(self, placement: "RecallPlacement", sequences: Sequence[Seq], rows: slice) -> None:
        self.rows = rows
        self._placement = placement
        self._sequences = sequences
        self._layout = placement.arena.layout
        device = placement.arena.keys.device
        self._positions = torch.tensor([s.num_computed for s in sequences], device=device)
        self._host_blocks = [placement.host_blocks(s) for s in sequences]
        self._query_start = torch.arange(len(sequences) + 1, dtype=torch.int32, device=device)
        self._tables = placement.device_tables(sequences)
        self._host_slots = torch.cat(
            [
                block_slots(blocks, torch.tensor([s.num_computed]), self._layout.block_size)
                for s, blocks in zip(sequences, self._host_blocks, strict=True)
            ]
        )
        self._fetches: dict[int, _Fetch] = {}

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """A full layer reads its device pages, any other its fetched rows and the new token."""
        if layer < self._placement.selection.num_full_layers:
            segment = self._full(layer, keys, values)
        else:
            segment = self._recalled(layer, queries, keys, values)
        found = self._placement.kernels.attend(
            queries, self._query_start, [segment], scale=scale, window=window, softcap=softcap
        )
        return found.out

    def _full(self, layer: int, keys: Tensor, values: Tensor) -> Segment:
        arena, size = self._placement.arena, self._layout.block_size
        tables = self._tables[layer]
        page = tables.gather(-1, (self._positions // size)[:, None, None].expand(-1, tables.shape[1], 1))[..., 0]
        slots = page.long() * size + (self._positions % size)[:, None]
        self._placement.kernels.append(keys, values, arena.keys, arena.values, slots)
        lengths = (self._positions + 1).int()[:, None].expand(-1, tables.shape[1]).contiguous()
        return Segment(arena.keys, arena.values, tables, lengths, causal=False)

    def _recalled(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Segment:
        self._store_new(layer, keys, values)
        fetch = self._fetches.pop(layer)
        staging = fetch.arrival.result()
        if self._placement.audit:
            self._audit(layer, queries, fetch.chosen)
        heads = self._layout.num_kv_heads
        ends = staging.first_slots() + fetch.counts[:, None]
        self._placement.kernels.append(keys, values, staging.keys, staging.values, ends)
        lengths = (fetch.counts + 1).int()[:, None].expand(-1, heads).contiguous()
        return Segment(staging.keys, staging.values, staging.tables, lengths, causal=False)

    def _store_new(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The new token's KV goes to the host and into the index."""
        placement, layout = self._placement, self._layout
        placement.host_kernels.append(
            keys.to(placement.host.keys.device), values.to(placement.host.keys.device),
            placement.host.keys, placement.host.values, self._host_slots,
            page_stride=layout.pages_per_block, page_offset=layout.page_offset(layer),
        )  # fmt: skip
        for i, sequence in enumerate(self._sequences):
            assert sequence.row is not None
            try:
                placement.index.add(layer, sequence.row, keys[i])
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                placement.failures.setdefault(sequence, error)

    # -- one layer ahead ----------------------------------------------------------------------------------------

    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """Guess what the next layer will read, and begin to fetch it."""
        following = layer + 1
        if following < self._placement.selection.num_full_layers or following >= self._layout.num_layers:
            return
        if following in self._fetches:
            return  # told twice: the hooks of another engine on the same model
        guesses = ask(following, self.rows)
        chosen = [self._choose(following, s, guesses[i]) for i, s in enumerate(self._sequences)]
        self._begin_fetch(following, chosen)

    def _choose(self, layer: int, sequence: Seq, query: Tensor) -> Tensor:
        """The tokens [H, n] the method names; if it fails, any one, and the request ends after the step."""
        placement, heads = self._placement, self._layout.num_kv_heads
        assert sequence.row is not None
        try:
            tokens = placement.index.choose(layer, sequence.row, query, placement.scales[layer])
            known = bool(((tokens >= 0) & (tokens < sequence.num_computed)).all())
            if tokens.ndim != 2 or tokens.shape[0] != heads or tokens.shape[1] < 1 or not known:
                raise ValueError(f"{placement.selection.name} named tokens that the request does not have")
        except Exception as error:  # a method is somebody's code: it may raise anything
            placement.failures.setdefault(sequence, error)
            return torch.zeros((heads, 1), dtype=torch.int64, device=query.device)
        return tokens

    def _begin_fetch(self, layer: int, chosen: list[Tensor]) -> None:
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
        device = self._placement.arena.keys.device
        arrival = self._placement.begin_fetch(
            layer, torch.cat(slots), torch.cat(targets).to(device), (len(chosen), num_pages)
        )
        self._fetches[layer] = _Fetch(arrival, counts.to(device), chosen)

    def _audit(self, layer: int, queries: Tensor, chosen: list[Tensor]) -> None:
        """Count how many of the tokens that the true queries score highest were fetched."""
        placement, layout = self._placement, self._layout
        for i, sequence in enumerate(self._sequences):
            tokens = torch.arange(sequence.num_computed)
            blocks, size = self._host_blocks[i], layout.block_size
            page = blocks[tokens // size] * layout.pages_per_block + layout.page_offset(layer)
            slots = (page + torch.arange(layout.num_kv_heads)[:, None]) * size + tokens % size
            keys = placement.host_kernels.gather(placement.host.keys, slots.flatten()).float()
            query = queries[i].float().cpu().reshape(layout.num_kv_heads, -1, layout.head_dim)
            scores = query @ keys.view(layout.num_kv_heads, -1, layout.head_dim).transpose(-1, -2)
            best = near(scores * placement.scales[layer], torch.inf, chosen[i].shape[1])
            hits = (best[..., :, None] == chosen[i].cpu()[..., None, :]).any(-1)
            sequence.attestation.recall_hits += int(hits.sum())
            sequence.attestation.recall_total += hits.numel()

    def _attest(self, i: int, tokens: Tensor) -> None:
        attestation = self._sequences[i].attestation
        row_bytes = 2 * self._layout.head_dim * self._placement.host.keys.element_size()
        attestation.tokens_fetched += tokens.numel()
        attestation.fetch_candidates += tokens.shape[0] * self._sequences[i].num_computed
        attestation.bytes_fetched += tokens.numel() * row_bytes
        name = self._placement.selection.name
        attestation.did[name] = attestation.did.get(name, 0) + tokens.numel()
