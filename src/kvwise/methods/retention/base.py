"""The seam of retention: after prefill a method says what stays; while decoding it names the victim.

A method sees views (masses, positions, counts) of *all* layers and heads at once and answers with tensors; the
engine moves the bytes and frees the pages. Methods hold no state: what they remember lives in the columns next to
the KV, so that it is preempted, forked and freed with it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.method import Axis, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptView:
    """The KV of one request when its prefill has ended.

    The first `num_prompt` of its `num_tokens` tokens are the prompt; there are others only if the request was
    preempted, and its output is computed again with the prompt. `mass` is float32 [L, H, T]: the attention each token
    received from all these rows (or from the method's `observed_rows`), summed over the query heads of its KV head;
    None unless the method sets `needs_mass`. Token t has position t.
    """

    num_tokens: int
    num_prompt: int
    capacity: int
    shape: tuple[int, int]  # L, H
    positions: Tensor
    mass: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeView:
    """The KV of the B requests that hold more than they may, after the attention of a decode step.

    `positions` is int32 [B, L, H, S] and `mass` float32 of that shape or None; `used` tells the S slots in use;
    `num_tokens` int [B] counts the tokens of each request so far and `capacity` [B] the slots it may hold.
    """

    positions: Tensor
    mass: Tensor | None
    used: Tensor
    num_tokens: Tensor
    capacity: Tensor


@dataclass(frozen=True)
class Retention(Method):
    """A method that decides which tokens stay.

    A method that `grows` keeps every token of the output: its capacity holds for the prompt alone, and it is never
    asked for victims.
    """

    axis: ClassVar[Axis] = Axis.RETENTION
    needs_mass: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    def observed_rows(self, num_prompt_tokens: int) -> int | None:
        """How many of the prompt's last rows count towards the mass; None: every row, also those behind the prompt."""
        return None

    @abstractmethod
    def capacity(self, num_prompt_tokens: int) -> int | None:
        """Slots a request may hold per layer and head once its prompt is known; None: no limit, nothing is dropped.

        Where the method `grows`, these are the slots of prompt tokens, and the output's come on top.
        """

    @abstractmethod
    def keep(self, view: PromptView) -> Tensor:
        """Which tokens stay: bool [L, H, T], at most `view.capacity` true per layer and head.

        Where the method `grows`, that many of the prompt and all that follow it.
        """

    @abstractmethod
    def victims(self, view: DecodeView) -> Tensor:
        """Which slot each layer and head gives up: int64 [B, L, H], an index into S; the next token takes it."""
