"""Fetching: what a selection method names comes from the host, unless it is on the device, and is read as a segment."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.recall_tiers import RecallTiers
from kvwise.engine.placement.shelf import Int64
from kvwise.engine.placement.staging import Staged, nothing
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.methods.selection.base import Index, Selection
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

    @property
    def num_full_layers(self) -> int:
        """First layers that are read in full, in this model."""
        return self.selection.full_layers(len(self.layers))

    def fork(self, source: Seq, sibling: Seq) -> None:
        """What the index has seen of the prompt of `source` is that of `sibling` too."""
        assert source.row is not None and sibling.row is not None
        try:
            self.index.fork(source.row, sibling.row)
        except Exception as error:  # a method is somebody's code: only the sibling fails, when it settles
            self.failures.setdefault(sibling, error)

    def failed(self) -> list[Failure]:
        """The failures so far, which are then forgotten."""
        found = list(self.failures.items())
        self.failures.clear()
        return found

    def follow_order(self, layer: int, row: int, rows: HostRows) -> None:
        """Lay the host's rows in the order the index wants, if it wants one for rows that have none."""
        order = self.index.order(layer, row, rows.num_ordered(layer))
        if order is not None:
            rows.reorder(layer, order.cpu().numpy())


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that reads: its first `num_rows` rows may be named, and row `own`, if given, is read besides.

    It may have no rows yet.

    The own row's slot is the one behind those that are fetched; who asks writes it there.
    """

    sequence: Seq
    rows: HostRows
    num_rows: int
    own: int | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Rows of one layer on their way: what each request reads, and where on the device it will lie."""

    layer: int
    asked: Sequence[Asked]
    chosen: Sequence[Int64]  # [H, n] of each request
    staged: Sequence[Staged]
    arrival: Future[None]

    def wait(self) -> None:
        """Until all has arrived. A transfer that failed raises, and ends the requests of its step."""
        self.arrival.result()

    def own_slots(self, block_size: int) -> Tensor:
        """Where each request's own row belongs: int64 [B, H], in page space of the staging pages."""
        slots = [s.pages[:, s.num_read // block_size] * block_size + s.num_read % block_size for s in self.staged]
        return torch.from_numpy(np.stack(slots))

    def segment(self, tiers: RecallTiers) -> Segment:
        """The rows as the kernels read them, own rows included."""
        longest = max(s.pages.shape[1] for s in self.staged)
        tables = np.stack([np.pad(s.pages, ((0, 0), (0, longest - s.pages.shape[1]))) for s in self.staged])
        counts = [s.num_read + (one.own is not None) for s, one in zip(self.staged, self.asked, strict=True)]
        lengths = torch.tensor(counts, dtype=torch.int32)[:, None].expand(-1, tables.shape[1])
        place = tiers.device.keys.device
        return Segment(
            tiers.staging.keys, tiers.staging.values, torch.from_numpy(tables).int().to(place),
            lengths.contiguous().to(place), causal=False,
        )  # fmt: skip

    def done(self) -> None:
        """The rows have been read."""
        for one in self.asked:
            one.rows.after_read(self.layer)


def begin_fetch(recall: Recall, layer: int, asked: Sequence[Asked], queries: Tensor) -> Fetch:
    """Ask the method what each request reads for its query of [B, Hq, D], guessed or real, and begin to fetch it."""
    chosen = [_choose(recall, layer, one, queries[i]) for i, one in enumerate(asked)]
    staged = [
        one.rows.stage(layer, rows, one.own) if rows.size else nothing(len(rows))
        for one, rows in zip(asked, chosen, strict=True)
    ]
    arrival = recall.tiers.begin_fetch(staged)
    for one, found in zip(asked, staged, strict=True):
        _attest(recall, one, found)
    return Fetch(layer, asked, chosen, staged, arrival)


def _choose(recall: Recall, layer: int, one: Asked, query: Tensor) -> Int64:
    """The rows [H, n] the method names; if it fails, any one, and the request ends after the step.

    In a full layer, who asks at all reads every row.
    """
    num_heads = recall.tiers.layout.num_kv_heads
    assert one.sequence.row is not None
    if layer < recall.num_full_layers or not one.num_rows:
        return np.tile(np.arange(one.num_rows), (num_heads, 1))
    try:
        found = recall.index.choose(layer, one.sequence.row, query, recall.layers[layer].scale, one.num_rows)
        named: Int64 = found.cpu().numpy()
        _check(recall.selection, named, num_heads, one.num_rows)
    except Exception as error:  # a method is somebody's code: it may raise anything
        recall.failures.setdefault(one.sequence, error)
        return np.zeros((num_heads, 1), dtype=np.int64)
    return named


def _check(selection: Selection, named: Int64, num_heads: int, num_rows: int) -> None:
    """Rows the request has, each once."""
    if (
        named.ndim != 2
        or named.shape[0] != num_heads
        or named.shape[1] < 1
        or not 0 <= named.min() <= named.max() < num_rows
    ):
        raise ValueError(f"{selection.name} named tokens that the request does not have")
    seen = np.zeros((num_heads, num_rows), dtype=np.bool_)
    seen[np.arange(num_heads)[:, None], named] = True
    if int(seen.sum()) < named.size:
        raise ValueError(f"{selection.name} named a token twice")


def _attest(recall: Recall, one: Asked, staged: Staged) -> None:
    attestation, num_heads = one.sequence.attestation, len(staged.pages)
    num_tokens = num_heads * staged.num_read
    attestation.tokens_fetched += num_tokens
    attestation.tokens_recalled_cached += staged.num_found
    attestation.fetch_candidates += num_heads * one.num_rows
    attestation.bytes_fetched += len(staged.fetch_from) * recall.tiers.row_bytes
    name = recall.selection.name
    attestation.did[name] = attestation.did.get(name, 0) + num_tokens
