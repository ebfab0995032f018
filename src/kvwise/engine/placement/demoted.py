"""Demoted tokens: what has left the device's pages, row by row on the host, indexed for those who look for it."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvwise.core.errors import CapacityError
from kvwise.engine.placement.host_pool import HostPool
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.page_state import Heads
from kvwise.engine.placement.recall_fetch import Recall
from kvwise.engine.placement.shelf import Int64
from kvwise.engine.sequence import Sequence as Seq
from kvwise.methods.retention.base import Kept

Int32 = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


class Demoted:
    """One request's: row i of a layer and head is the i-th token that has left there."""

    def __init__(self, sequence: Seq, rows: HostRows, num_layers: int, num_heads: int) -> None:
        self.sequence = sequence
        self.rows = rows
        self.counts: Int64 = np.zeros(num_layers, dtype=np.int64)  # rows of each layer
        self._positions: Int32 = np.zeros((num_layers, num_heads, 0), dtype=np.int32)

    def note(self, layer: int, positions: Int32) -> None:
        """Tokens at positions [H, n] have become the next rows of a layer."""
        first = int(self.counts[layer])
        last = first + positions.shape[1]
        room = self._positions.shape[2]
        if last > room:
            self._positions = np.pad(self._positions, ((0, 0), (0, 0), (0, max(last - room, room // 2))))
        self._positions[layer, :, first:last] = positions
        self.counts[layer] = last

    def positions(self, layer: int) -> Int32:
        """Positions [H, n] of the tokens that have left a layer, in the order in which they left."""
        return self._positions[layer, :, : self.counts[layer]]

    def recalled(self, layer: int) -> list[list[int]]:
        """Positions that each head of a layer read in the last step, sorted."""
        read = self.rows.read.get(layer)
        if read is None:
            return [[]] * self._positions.shape[1]
        found: list[list[int]] = np.sort(np.take_along_axis(self._positions[layer], read, 1)).tolist()
        return found


class Demotion:
    """Takes what leaves the pages: stores it on the host and has the index learn of it.

    Whatever goes wrong ends the request that it concerns, after the step: nothing is raised.
    """

    def __init__(self, recall: Recall, host: HostPool) -> None:
        self._recall = recall
        self._host = host
        self._shape = (recall.tiers.layout.num_layers, recall.tiers.layout.num_kv_heads)
        self._held: dict[int, Demoted] = {}  # by row of the device's cache

    def of(self, row: int) -> Demoted:
        """What has left of the settled request in this row."""
        return self._held[row]

    def open(self, row: int, sequence: Seq, rows: HostRows) -> None:
        """A request is about to settle in this row, and has host rows, with room for all its tokens."""
        self._held[row] = Demoted(sequence, rows, *self._shape)

    def forget(self, row: int) -> None:
        """The request in this row has ended; one that is not known is no error."""
        self._held.pop(row, None)

    def start(self, row: int, kept: Kept) -> None:
        """Of the host's room only what is needed stays reserved."""
        leaving = (~kept.mask).sum(-1)
        self._host.shrink(self._held[row].rows, int(leaving.max()))

    def take(self, heads: Heads, keys: Tensor, values: Tensor, positions: Callable[[], Tensor]) -> None:
        """Store rows, layer by layer of each request, all in one transfer, then index them."""
        groups = [(*found, slots) for found in self._groups(heads) if (slots := self._slots(heads, *found)) is not None]
        if not groups or not self._store(groups, keys, values):
            return
        places = positions().cpu().numpy().astype(np.int32)
        for held, layer, part, slots in groups:
            own = torch.arange(part.start, part.stop, device=keys.device).view(slots.shape)
            try:
                self._index(held, layer, keys[own].transpose(0, 1))
            except Exception as error:  # a method is somebody's code: only its request fails, after the step
                self._recall.failures.setdefault(held.sequence, error)
            held.note(layer, places[part].reshape(slots.shape))

    def _groups(self, heads: Heads) -> Iterator[tuple[Demoted, int, slice]]:
        """What leaves of each request and layer."""
        number = heads.rows * self._shape[0] + heads.layers
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(heads)]
        for first, last in pairwise(cuts):
            if last > first:
                yield self._held[int(heads.rows[first])], int(heads.layers[first]), slice(first, last)

    def _slots(self, heads: Heads, held: Demoted, layer: int, part: slice) -> Int64 | None:
        """Host slots [H, n] for the next rows of a layer; None if the request fails for want of them."""
        num_heads = self._shape[1]
        places = heads.heads[part]
        num_rows, rest = divmod(len(places), num_heads)
        which = np.broadcast_to(np.arange(num_heads)[:, None], (num_heads, num_rows))
        if rest or (places.reshape(which.shape) != which).any():
            error = f"different numbers of tokens leave the heads of layer {layer}: no selection can bring them back"
            self._recall.failures.setdefault(held.sequence, ValueError(error))
            return None
        first = int(held.counts[layer])
        if not self._host.reserve(held.rows, first + num_rows):
            full = CapacityError("no host memory is left for the tokens that leave: raise kv_offloading_bytes")
            self._recall.failures.setdefault(held.sequence, full)
            return None
        return held.rows.slots(layer, which, np.broadcast_to(first + np.arange(num_rows), which.shape))

    def _store(self, groups: list[tuple[Demoted, int, slice, Int64]], keys: Tensor, values: Tensor) -> bool:
        index = np.concatenate([np.arange(part.start, part.stop) for _, _, part, _ in groups])
        slots = np.concatenate([slots.ravel() for *_, slots in groups])
        rows = torch.from_numpy(index).to(keys.device)
        try:
            self._recall.tiers.begin_store_rows(keys[rows], values[rows], slots).result()
        except Exception as error:
            for held, *_ in groups:
                self._recall.failures.setdefault(held.sequence, error)
            return False
        return True

    def _index(self, held: Demoted, layer: int, keys: Tensor) -> None:
        """The index learns of keys [n, H, D], as they are stored, where it is ever asked."""
        if layer < self._recall.num_full_layers:
            return
        row, index = held.sequence.row, self._recall.index
        assert row is not None
        stored = keys.to(self._recall.tiers.host.keys.dtype)
        if not held.counts[layer]:
            index.build(layer, row, stored)
            self._recall.follow_order(layer, row, held.rows)
            return
        for one in stored:
            index.add(layer, row, one)
            self._recall.follow_order(layer, row, held.rows)
