"""The seam of retention: after prefill a method says what stays; while decoding it says what each token is worth.

A method sees views (masses, attention rows, positions, counts) of *all* layers and heads at once and answers with
tensors; the engine moves the bytes, frees the pages and tells who left. Methods hold no state: what they remember
lives in the columns next to the KV, or in `Kept.marks`, so that it is preempted, forked and freed with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Axis, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvwise.kernels.base import Kernels

Spans = tuple[tuple[int, int], ...]  # (first, stop) positions of image tokens


@dataclass(frozen=True, slots=True)
class PromptView:
    """The KV of one request when its prefill has ended.

    The first `num_prompt` of its `num_tokens` tokens are the prompt; there are others only if the request was
    preempted, and its output is computed again with the prompt. Token t has position t. `capacity` is what the
    method's `capacity` says of this prompt, `spans` are the positions of image tokens.

    `mass` is float32 [L, H, T]: the attention each token received from all these rows, summed over the query heads
    of its KV head; None unless the method sets `needs_mass`. `rows(layer)` is float32 [H, G, W, T]: the
    attention of the prompt's last W = `observed_rows` rows (causal probabilities; a row's later tokens have 0).
    `keys(layer)` and `values(layer)` are float32 [H, T, D], keys rotated.
    """

    num_tokens: int
    num_prompt: int
    capacity: int | None
    shape: tuple[int, int]  # L, H
    positions: Tensor
    mass: Tensor | None
    rows: Callable[[int], Tensor]
    keys: Callable[[int], Tensor]
    values: Callable[[int], Tensor]
    spans: Spans = ()


@dataclass(frozen=True, slots=True)
class Merge:
    """How dropped tokens live on in kept ones.

    Kept token p becomes sum over the tokens t with `target[t] == p` of `key_weights[t] * key[t]`, likewise values;
    a kept token is a source of itself. Tokens with weight 0 add nothing, so `target` of a token that is
    simply dropped may name any token. `target` is int64 [L, H, T], the weights float32 [L, H, T].
    """

    target: Tensor
    key_weights: Tensor
    value_weights: Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a prompt.

    `mask` is bool [L, H, T]. `limit` int [L, H] is how many tokens each head may hold while decoding (None: the cache
    grows with the output). `marks` float32 [L, H] is what the method wants to see of this request in every
    `DecodeView`; `mass` float32 [L, H, T] is what each token's mass starts with there (None: that of the prompt).
    """

    mask: Tensor
    limit: Tensor | None = None
    merge: Merge | None = None
    marks: Tensor | None = None
    mass: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeView:
    """The KV of B requests after the attention of a decode step.

    `positions` is int32 [B, L, H, S] and `mass` float32 of that shape or None; `used` tells the S slots in use;
    `num_tokens` int [B] counts the tokens of each request so far, `limit` [B, L, H] the slots each head may hold, and
    `marks` float32 [B, L, H] is what `Kept.marks` said (0 where nothing).
    """

    positions: Tensor
    mass: Tensor | None
    used: Tensor
    num_tokens: Tensor
    limit: Tensor
    marks: Tensor


@dataclass(frozen=True, slots=True)
class ResidualShape:
    """What a residual must know: rows of requests R, layers, heads, and where the model's files lie (None: nowhere)."""

    max_rows: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    model: str
    folder: Path | None
    kernels: Kernels | None = None  # that fold and merge; None: the reference's


class Residual(ABC):
    """What a method keeps of tokens that have left, besides the pages; a `row` is a running request."""

    @abstractmethod
    def start(self, row: int) -> None:
        """A request has settled in this row: nothing has left yet."""

    @abstractmethod
    def fold(self, rows: Tensor, layers: Tensor, heads: Tensor, keys: Tensor, values: Tensor) -> None:
        """Tokens leave for good: rows, layers, heads int64 [n] (triples may repeat); keys (rotated), values [n, D]."""

    @abstractmethod
    def merge(self, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Add to what B requests attended to: rows int64 [B], queries and out [B, Hq, D], lse float32 [B, Hq]."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Device bytes held."""


@dataclass(frozen=True)
class Retention(Method):
    """A method that decides which tokens stay.

    Where it `grows`, it keeps every token of the output: its capacity holds for the prompt alone, and `worth` is never
    asked, only `stays`, every `sweep_interval` tokens of the output (None: never).
    """

    axis: ClassVar[Axis] = Axis.RETENTION
    needs_mass: ClassVar[bool] = False  # of every row of the prompt
    tracks_mass: ClassVar[bool] = True  # with `needs_mass`: also of every row of the output
    marks_rows: ClassVar[bool] = False  # `mass` holds instead the position of the last row that marked the token
    grows: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # dropped tokens live on in kept ones
    sweep_interval: ClassVar[int | None] = None

    @property
    def drops(self) -> bool:
        """Whether anything is ever dropped; at a budget of 1 nothing is."""
        return True

    @property
    def ranks_by_mass(self) -> bool:
        """Whether `worth` is the mass, but infinite for the latest tokens, as many as the marks say.

        Kernels then find who leaves where the masses lie, and `worth` is asked only where tokens are packed. A class
        with a `worth` of its own says so again, or it is not so.
        """
        return False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "worth" in vars(cls) and "ranks_by_mass" not in vars(cls):
            cls.ranks_by_mass = Retention.ranks_by_mass  # type: ignore[method-assign]

    def observed_rows(self, num_prompt_tokens: int, spans: Spans = ()) -> int:
        """How many of the prompt's last rows `PromptView.rows` must tell of."""
        return 0

    @abstractmethod
    def capacity(self, num_prompt_tokens: int) -> int | None:
        """Slots a request may hold on average of its layers and heads; None: as many as the method finds worth it.

        Where the method `grows`, these are the slots of prompt tokens, and the output's come on top.
        """

    @abstractmethod
    def keep(self, view: PromptView) -> Kept:
        """What stays: on average of layers and heads at most `view.capacity` tokens.

        Where the method `grows`, that many of the prompt and all that follow it.
        """

    def worth(self, view: DecodeView) -> Tensor:
        """What each slot is worth, float [B, L, H, S]: in a head over its limit the least worth one leaves.

        Infinite: it must stay. Of equals the one in the earlier slot leaves.
        """
        raise AssertionError(f"{self.name} never has more tokens than it may")

    def stays(self, view: DecodeView) -> Tensor:
        """Which slots stay in a sweep: bool [B, L, H, S]; at least one of each head."""
        raise AssertionError(f"{self.name} does not sweep")

    def residual(self, shape: ResidualShape) -> Residual | None:
        """What is kept of tokens that have left; None: nothing."""
        return None


def uniform(view: PromptView, mask: Tensor) -> Kept:
    """`mask`, and every head may go on holding the capacity."""
    import torch

    assert view.capacity is not None
    return Kept(mask, torch.full(view.shape, view.capacity, dtype=torch.int32, device=mask.device))
