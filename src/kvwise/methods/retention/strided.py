"""The seam of strided retention: a prompt is read stride by stride, and after each the method lays out what it keeps.

Such a method holds its slots for good and fills them by a rule of its own. A request costs it the same memory however
long the text, and a prompt costs time in proportion to its length: every stride attends to what is kept and to
itself. While decoding each token is a stride.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvwise.methods.retention.base import Kept, PromptView, Retention

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Run(NamedTuple):
    """Neighbouring slots that are in use. Queries turn by `turn` positions before they meet its keys."""

    start: int
    length: int
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what is kept of a request's first `num_tokens` tokens lies, the same in every layer and head.

    `runs` are the slots in use, in their order; the next token goes to slot `end`, and the tokens of a stride follow
    one another. A run that reaches `end` has turn 0. `rotation` int64 [end] is the position by which the key in each
    slot is rotated; new tokens are rotated by their own.
    """

    num_tokens: int
    runs: tuple[Run, ...]
    end: int
    rotation: Ints


@dataclass(frozen=True, slots=True)
class Moves:
    """What a method makes of a stride: the token in slot `source[l, h, i]` goes to slot `target[i]`, all at once.

    Slots that are not named keep theirs; `source` int64 [L, H, n] (or [L, 1, n], if heads agree) counts the stride's
    tokens from the old `end` on. `layout` is how they lie then, and whoever lies in no run has left.
    """

    layout: Layout
    target: Ints
    source: Ints


@dataclass(frozen=True)
class Strided(Retention):
    """A method that decides after every stride, by the attention that slots have received.

    That is their *mass*: summed over all rows since a token came and over the G query heads of its KV head, each row
    counting `row_decay` times as much as the next, up to a factor that all slots of a request share at a time. So none
    of it is touched as time passes, and of the slots of a stride only those are read that the method asks for.
    """

    needs_mass: ClassVar[bool] = True

    @property
    def strides(self) -> int | None:
        """Tokens of a stride of the prompt; None: the whole prompt is one."""
        return None

    @property
    def turns(self) -> bool:
        """Whether keys and queries are rotated by other positions than their tokens' own."""
        return False

    @property
    def row_decay(self) -> float:
        """How much of its weight a row's attention keeps with every row that follows."""
        return 1.0

    @abstractmethod
    def num_slots(self, num_prompt_tokens: int) -> int:
        """The most slots of a head that `layout`s of such a request span, gaps included."""

    @abstractmethod
    def start(self, num_prompt_tokens: int) -> Layout:
        """Nothing is kept yet of a request with such a prompt."""

    @abstractmethod
    def asks(self, layout: Layout, num_new: int) -> Ints:
        """The slots [n] whose mass `arrange` wants to see; the stride's tokens are from `end` on."""

    @abstractmethod
    def arrange(self, layout: Layout, num_new: int, asked: Ints, mass: Floats) -> Moves:
        """Take in the `num_new` tokens of a stride; `mass` float32 [L, H, n] of the slots `asked` for."""

    def keep(self, view: PromptView) -> Kept:
        """Never asked."""
        raise AssertionError(f"{self.name} keeps stride by stride")
