"""Quest: each page of keys is known by its bounds, and a query reads the pages whose keys could score highest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from kvwise.core.method import Trait
from kvwise.methods.selection.base import Index, IndexShape, Selection, likeliest, voted

if TYPE_CHECKING:
    from torch import Tensor

_ROOM = 8  # pages by which an index grows


@dataclass(frozen=True)
class Quest(Selection):
    """Quest, arXiv 2406.10774 section 3.

    For each `page` of consecutive tokens, the smallest and the largest key of every channel are kept on the device. No
    key in it can score above the sum over channels of max(q * min, q * max); a query reads the pages with the highest
    bounds. Layers 0 and 1 are read in full and stay on the device.

    The budget is the share `budget` of the tokens before the query's. Of it the tokens of the page that is not full
    yet are read in any case, and the last page is cut off. In the paper all KV lies on the device; here it lies on the
    host, and pages are fetched; what one of the last `keep` steps read is still on the device. With grouped queries
    (the paper has none) the group's heads add their probabilities over the bounds.
    """

    budget: float = 0.2
    page: int = 16
    keep: int = 1

    name: ClassVar[str] = "quest"
    idea: ClassVar[str] = "keep all KV in host memory and fetch the pages whose bounds promise the highest scores"
    paper: ClassVar[str] = "Quest, arXiv 2406.10774"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.RECALLS})
    num_full_layers: ClassVar[int] = 2
    looks_ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("page", self.page >= 1, "at least 1")
        self.require("keep", self.keep >= 0, "0 or more")

    @property
    def kept_steps(self) -> int:
        """As asked."""
        return self.keep

    def index(self, shape: IndexShape) -> QuestIndex:
        """Bounds of every request's pages."""
        return QuestIndex(self, shape)

    def best(self, scores: Tensor, num: int) -> Tensor:
        """The tokens with the largest probabilities, summed over the group."""
        return likeliest(scores, scores.shape[-1] - 1, num)


@dataclass(slots=True)
class _Bounds:
    """One layer of one request: bounds of its pages, in the dtype of the keys."""

    low: Tensor  # [H, room, D]
    high: Tensor  # [H, room, D]
    num_tokens: int


@dataclass(eq=False)
class QuestIndex(Index):
    """Bounds per request and layer, and no copy of the keys."""

    method: Quest
    shape: IndexShape
    rows: dict[int, dict[int, _Bounds]] = field(default_factory=dict)

    def calibrate(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is learnt."""

    def observe(self, layer: int, row: int, queries: Tensor, keys: Tensor) -> None:
        """Nothing is noted: the keys come with `build`."""

    def fork(self, row: int, target: int) -> None:
        """Nothing was noted."""

    def build(self, layer: int, row: int, keys: Tensor) -> None:
        """Bound the prompt's pages; the last may not be full."""
        pages = torch.split(keys.transpose(0, 1), self.method.page, dim=1)
        low, high = (torch.stack([bound(page, dim=1) for page in pages], dim=1) for bound in (torch.amin, torch.amax))
        self.rows.setdefault(row, {})[layer] = _Bounds(low, high, keys.shape[0])

    def add(self, layer: int, row: int, keys: Tensor) -> None:
        """Widen the last page's bounds, or begin a page."""
        held, keys = self.rows[row][layer], keys.to(self.rows[row][layer].low.dtype)
        page, inside = divmod(held.num_tokens, self.method.page)
        if page == held.low.shape[1]:
            held.low, held.high = (torch.nn.functional.pad(b, (0, 0, 0, _ROOM)) for b in (held.low, held.high))
        held.low[:, page] = keys if inside == 0 else torch.minimum(held.low[:, page], keys)
        held.high[:, page] = keys if inside == 0 else torch.maximum(held.high[:, page], keys)
        held.num_tokens += 1

    def choose(self, layer: int, row: int, query: Tensor, scale: float, num_tokens: int) -> Tensor:
        """The pages with the highest bounds, and the tokens behind them."""
        held, size = self.rows[row][layer], self.method.page
        most = max(1, int(self.method.budget * num_tokens))
        recent = min(num_tokens % size, most)
        newest = torch.arange(num_tokens - recent, num_tokens, device=query.device)
        place = torch.arange(most - recent, device=query.device)
        ranking = self._scores(held, num_tokens // size, query, scale).argsort(dim=-1, descending=True, stable=True)
        paged = ranking[:, place // size] * size + place % size
        return torch.cat([paged, newest.expand(len(paged), -1)], dim=1)

    def _scores(self, held: _Bounds, num_pages: int, query: Tensor, scale: float) -> Tensor:
        """What the best key of each page could score, the group's heads taken together: [H, P]."""
        grouped = query.float().reshape(self.shape.num_kv_heads, -1, self.shape.head_dim)
        low, high = (bound[:, :num_pages].float().transpose(-1, -2) for bound in (held.low, held.high))
        # max(q * low, q * high) is q * high where q is positive and q * low where it is negative.
        return voted((grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low) * scale)

    def drop(self, row: int) -> None:
        """Forget a request."""
        self.rows.pop(row, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all bounds."""
        each = (held for layers in self.rows.values() for held in layers.values())
        return sum(held.low.nbytes + held.high.nbytes for held in each)
