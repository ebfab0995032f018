"""What a task is written in: symbols, statements, questions and filler, as token ids."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from kvwise.core.errors import TaskError

Tokens = tuple[int, ...]


class Language(ABC):
    """Turns what a task says into tokens.

    A *symbol* is a key, a value or a word, as the tokens that spell it. `begin` opens every context.
    """

    begin: Tokens
    num_symbols: int | None = None  # how many different keys, and values, there are; None: more than anyone needs

    @abstractmethod
    def keys(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """`count` different keys."""

    @abstractmethod
    def values(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """`count` different values, none of them a key."""

    @abstractmethod
    def words(self, rng: np.random.Generator, group: int, count: int) -> list[Tokens]:
        """`count` different words of one of the `num_groups` groups of words to be counted."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """How many groups of words there are; a question about counts names its group."""

    @abstractmethod
    def assign(self, key: Tokens, values: Sequence[Tokens]) -> Tokens:
        """`key` has `values`."""

    @abstractmethod
    def ask(self, key: Tokens) -> Tokens:
        """Which values has `key`? The answer is `answer(values)`."""

    def exchange(self, key: Tokens, values: Sequence[Tokens]) -> Tokens:
        """A question about `key` with its answer, as part of a context."""
        return (*self.ask(key), *self.answer(values))

    @abstractmethod
    def link(self, source: Tokens, variable: Tokens) -> Tokens:
        """`variable` is assigned what `source` is (a value or another variable)."""

    @abstractmethod
    def ask_links(self, value: Tokens) -> Tokens:
        """Which variables have `value`, directly or through others?"""

    def mention(self, word: Tokens) -> Tokens:
        """One occurrence of a word to be counted."""
        return word

    @abstractmethod
    def ask_count(self, group: int) -> Tokens:
        """Which word of `group` comes most often?"""

    @abstractmethod
    def passage(self, symbols: Sequence[Tokens]) -> Tokens:
        """A text to be copied later."""

    @abstractmethod
    def ask_passage(self, opening: Sequence[Tokens]) -> Tokens:
        """How does the passage that begins with `opening` go on?"""

    @abstractmethod
    def answer(self, symbols: Sequence[Tokens]) -> Tokens:
        """Symbols as an answer gives them."""

    @abstractmethod
    def filler(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` tokens of text that says nothing."""

    def pauses(self, filler: Sequence[int], cuts: Sequence[int]) -> Sequence[int]:
        """Where statements stand that were to interrupt `filler` at `cuts` (ascending): there, or a little later."""
        return cuts

    def num_facts(self, length: int, statement: Tokens, symbols: int) -> int:
        """How many statements such as `statement`, of `symbols` keys or values each, a context should hold.

        They take about a fifth of its `length` tokens, and no more symbols than there are.
        """
        count = max(2, 3 * length // (16 * len(statement)))
        return count if self.num_symbols is None else min(count, self.num_symbols // symbols)

    def too_short(self, length: int, needed: int) -> TaskError:
        """The error for a context that cannot hold its statements."""
        return TaskError(f"a context of {length} tokens is too short for this task: it needs at least {needed}")
