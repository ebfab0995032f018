"""One request's KV on the host, row by row: where each lies, and which of them are on the device just now."""

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.recall_tiers import RecallTiers
from kvwise.engine.placement.shelf import Int64, Shelf
from kvwise.engine.placement.staging import Staged


class HostRows:
    """Rows 0, 1, ... of every layer and KV head, in the host blocks `blocks` int64 [N].

    Row i lies at place i of its head, until an order is asked for. What a method names and fetches are rows; with all
    of a request's tokens on the host, row i is token i.
    """

    def __init__(self, tiers: RecallTiers, keep: int) -> None:
        self.blocks: Int64 = np.zeros(0, dtype=np.int64)
        self.read: dict[int, Int64] = {}  # layer -> [H, n]: rows the last step read
        self._tiers = tiers
        self._layout = tiers.layout
        self._keep = keep
        self._places: dict[int, Int64] = {}  # layer -> [H, n]: where the first n rows lie
        self._shelves: dict[int, Shelf] = {}
        self._pages: dict[int, Int64] = {}  # layer -> [H, N]: staging pages

    # -- on the host --------------------------------------------------------------------------------------------

    def slots(self, layer: int, heads: Int64, rows: Int64) -> Int64:
        """Host slots (page space) of rows of a layer."""
        return self._slots_at(layer, heads, self._places_of(layer, heads, rows))

    def _places_of(self, layer: int, heads: Int64, rows: Int64) -> Int64:
        if layer not in self._places:
            return rows
        places = self._places[layer]
        ordered = rows < places.shape[1]
        return np.where(ordered, places[heads, np.where(ordered, rows, 0)], rows)

    def _slots_at(self, layer: int, heads: Int64, places: Int64) -> Int64:
        layout, size = self._layout, self._layout.block_size
        page = self.blocks[places // size] * layout.pages_per_block + layout.page_offset(layer) + heads
        slots: Int64 = page * size + places % size
        return slots

    def num_ordered(self, layer: int) -> int:
        """Rows of a layer that lie in an order of their own."""
        return self._places[layer].shape[1] if layer in self._places else 0

    def reorder(self, layer: int, order: Int64) -> None:
        """Have the next rows [H, n], those after the ordered ones, lie in this order: a permutation in every head."""
        num_heads, num_rows = order.shape
        first = self.num_ordered(layer)
        heads = np.broadcast_to(np.arange(num_heads)[:, None], order.shape)
        places = np.broadcast_to(first + np.arange(num_rows), order.shape)
        found = np.full(order.shape, -1)
        inside = (order >= first) & (order < first + num_rows)
        if inside.all():
            found[heads, order - first] = places
        if (found < 0).any():
            raise ValueError(f"the order of rows {first} to {first + num_rows - 1} names one twice or none of them")
        self._tiers.permute(self._slots_at(layer, heads, order), self._slots_at(layer, heads, places))
        before = self._places.get(layer, found[:, :0])
        self._places[layer] = np.concatenate([before, found], axis=1)

    def keys(self, layer: int, num_rows: int) -> Tensor:
        """Keys [H, T, D] of the first rows of a layer, row by row."""
        heads = np.broadcast_to(np.arange(self._layout.num_kv_heads)[:, None], (self._layout.num_kv_heads, num_rows))
        slots = self.slots(layer, heads, np.broadcast_to(np.arange(num_rows), heads.shape))
        return self._tiers.host_keys(torch.from_numpy(slots.ravel())).view(*slots.shape, -1)

    # -- on the device ------------------------------------------------------------------------------------------

    def stage(self, layer: int, chosen: Int64, own: int | None) -> Staged:
        """Have the chosen rows [H, n] lie in front of this layer's staging pages, and `own` behind them."""
        self.read[layer] = chosen
        shelf = self._shelves.setdefault(layer, Shelf(self._layout.num_kv_heads, self._keep))
        plan = shelf.plan(chosen, own)
        before = self._pages.get(layer, np.zeros((len(chosen), 0), dtype=np.int64))
        pages = self._pages[layer] = self._resized(before, self._layout.num_blocks_for(plan.num_slots))
        heads, rows, into = plan.fetched
        return Staged(
            pages,
            chosen.shape[1],
            plan.num_found,
            move_from=self._inside(before, plan.moved[0], plan.moved[1]),
            move_to=self._inside(pages, plan.moved[0], plan.moved[2]),
            fetch_from=self.slots(layer, heads, rows),
            fetch_to=self._inside(pages, heads, into),
        )

    def _resized(self, pages: Int64, num_pages: int) -> Int64:
        """As many pages [H, N] for each head; those given back may still be read by transfers begun by now."""
        num_heads, have = pages.shape
        if num_pages <= have:
            self._tiers.staging.give(pages[:, num_pages:])
            return pages[:, :num_pages]
        more = self._tiers.take_pages((num_pages - have) * num_heads)
        return np.concatenate([pages, more.reshape(num_heads, -1)], axis=1)

    def _inside(self, pages: Int64, heads: Int64, slots: Int64) -> Int64:
        size = self._layout.block_size
        inside: Int64 = pages[heads, slots // size] * size + slots % size
        return inside

    def after_read(self, layer: int) -> None:
        """The layer has read its rows: unless they are kept for later steps, their pages are free."""
        if not self._keep:
            self.forget(layer)

    def forget(self, layer: int) -> None:
        """Nothing of a layer is on the device any more."""
        self._shelves.pop(layer, None)
        if layer in self._pages:
            self._tiers.staging.give(self._pages.pop(layer))

    def clear(self) -> None:
        """Nothing of any layer is on the device any more."""
        for layer in list(self._pages):
            self.forget(layer)
