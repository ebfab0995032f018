"""The seam of selection: all tokens are kept in a slower tier, and a method says which of them a query reads.

The method is an *index* on the device: it learns about a request's keys, and for a query it names tokens. Moving the
bytes (to the host after prefill, back over the link when a layer needs them) is common ground, written once in
`engine/placement/recall.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Axis, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class IndexShape:
    """What an index must know of the model. `softcaps`: each layer's bound on logits; empty if none has one."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    softcaps: tuple[float | None, ...] = ()


class Index(ABC):
    """What a selection method keeps on the device to find tokens. A `row` is a running request.

    Shapes: queries [T, Hq, D], keys [T, H, D], rotated. Query head h * G + g belongs to KV head h.
    """

    @abstractmethod
    def calibrate(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Learn about the model from a sample prompt, once, before any request."""

    @abstractmethod
    def observe(self, layer: int, row: int, queries: Tensor, keys: Tensor) -> None:
        """See a chunk of a request's prompt as it is computed."""

    @abstractmethod
    def fork(self, row: int, target: int) -> None:
        """Request `target` has the same prompt: give it what was observed of `row`. Neither has been built."""

    @abstractmethod
    def build(self, layer: int, row: int, keys: Tensor) -> None:
        """The prompt is complete: index all its keys [T, H, D]."""

    @abstractmethod
    def add(self, layer: int, row: int, keys: Tensor) -> None:
        """Index the keys [H, D] of one more token."""

    @abstractmethod
    def choose(self, layer: int, row: int, query: Tensor, scale: float, num_tokens: int) -> Tensor:
        """Of the first `num_tokens` tokens those to read for query [Hq, D]: int64 [H, n], n >= 1 for every head alike.

        The query's own token is read in any case and is not named. A method that looks ahead is asked before that
        token is added, with a guessed query. Any other is asked with the real one, afterwards, so that the own token
        is the last of all; unless a retention method keeps it (see `Selection`).
        """

    def order(self, layer: int, row: int, first: int) -> Tensor | None:
        """In which order tokens `first`, `first + 1`, ... lie best on the host: int64 [H, n]; None: as they came.

        Asked after `build` and after each `add`, `first` tokens having been ordered before. What a query reads
        together then lies together, and is fetched in few long runs.
        """
        return None

    @abstractmethod
    def drop(self, row: int) -> None:
        """Forget a request; one that is not known is no error."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Device bytes held for all requests."""


@dataclass(frozen=True)
class Selection(Method):
    """A method that decides which stored tokens a query reads.

    Together with a retention method it decides which of the tokens that have left are read besides those that stay:
    its index holds these alone, in the order in which they left, and its budget is a share of them. In the layers that
    are read in full every one of them is fetched.
    """

    axis: ClassVar[Axis] = Axis.SELECTION
    num_full_layers: ClassVar[int] = 0  # first layers that stay on the device and are read in full
    looks_ahead: ClassVar[bool] = True  # chooses by a query guessed one layer ahead; False: by the layer's own
    grows: ClassVar[bool] = False  # whether tokens made since the prompt may be read beyond the budget

    @property
    def kept_steps(self) -> int:
        """Steps for which a fetched row stays on the device, to be read again without being fetched."""
        return 0

    def full_layers(self, num_layers: int) -> int:
        """How many layers of a model are read in full: however few it has, the method decides in one, if it can."""
        return min(self.num_full_layers, max(num_layers - 1, 1 if self.looks_ahead else 0))

    @abstractmethod
    def index(self, shape: IndexShape) -> Index:
        """A fresh index for a model of this shape."""

    def best(self, scores: Tensor, num: int) -> Tensor:
        """What the method would name, int64 [H, num], had it known the true scores [H, G, T + 1].

        The last score is that of the query's own token, which is never named. An audit compares with this.
        """
        return near(scores[..., :-1], math.inf, num)


def likeliest(scores: Tensor, num_tokens: int, num: int) -> Tensor:
    """Of the first `num_tokens` the tokens int64 [H, num] with the largest attention, added up over the group.

    Scores are [H, G, T]; those after the first may be of tokens that are not to be named.
    """
    return scores.softmax(-1).sum(1)[..., :num_tokens].topk(num, dim=-1).indices


def voted(scores: Tensor) -> Tensor:
    """Scores [H, G, C] of places to read -> [H, C]: the group's query heads add their probabilities, as logarithms.

    With one query head the order is that of its scores.
    """
    return scores.log_softmax(-1).logsumexp(1)


def near(scores: Tensor, alpha: float, most: int) -> Tensor:
    """Tokens whose score [H, G, T] is within `alpha` of the best: int64 [H, n], n the mean count, at most `most`."""
    behind = scores - scores.amax(-1, keepdim=True)
    wanted = (behind > -alpha).sum(-1).float().mean()
    num = max(1, min(math.ceil(float(wanted)), most, scores.shape[-1]))
    return behind.amax(1).topk(num, dim=-1).indices
