"""One step of recall: which rows a layer reads, how they come from the host, and how the layer reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise.engine.placement.compact import block_slots
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.recall_fetch import Asked, Fetch, Recall
from kvwise.engine.placement.recall_reader import Reader
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.models.attention import AskAhead, LooksAhead


class RecallPart:
    """Decoding sequences whose KV is on the host, in `host` rows; a layer waits while its rows are fetched.

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
        self._reader = Reader(recall, lambda layer: self._asked)
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
        fetch = self._reader.arrived(layer, queries, keys)
        assert fetch is not None
        self._follow_order(layer)
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


class AheadPart(RecallPart, LooksAhead):
    """For methods that guess: the rows a layer reads are fetched while the layer before it runs."""

    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """Guess what the next layer will read, and begin to fetch it."""
        self._reader.look_ahead(layer, ask, self.rows)
