"""The seam of tasks: a context, questions about it, and the tokens that answer them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.core.options import check_options, show_call, show_value
from kvwise.tasks.language import Language

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked once the context has been read: `prompt` tokens, and the only right `answer`.

    `evidence` holds the positions in the context of the tokens that carry the answer: whoever holds none of them
    can only guess.
    """

    prompt: Tokens
    answer: Tokens
    evidence: Tokens = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """One context with questions. No two questions ask for the same fact: an answer must not give away another."""

    context: Tokens
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task(ABC):
    """A way of making episodes; a subclass states `name`, `idea` (one line), `source` and whether it is `exact`.

    It is a frozen dataclass whose fields are its options, each with a default. An exact task has one right answer;
    the other kind (`exact = False`) has a likely continuation and is judged by its negative log-likelihood alone.
    """

    name: ClassVar[str]
    idea: ClassVar[str]
    source: ClassVar[str]
    exact: ClassVar[bool] = True

    @abstractmethod
    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """An episode whose context has exactly `length` tokens; TaskError if that is too short for the task."""

    def __str__(self) -> str:
        return show_call(self.name, self)

    def require(self, option: str, ok: bool, limit: str) -> None:
        """Refuse the value of `option` unless `ok`, naming the value and the limit."""
        if not ok:
            value = show_value(getattr(self, option))
            raise TaskError(f"{self.name}: {option}={value} is out of range: it must be {limit}")

    @classmethod
    def build(cls, options: Mapping[str, object]) -> Self:
        """Make the task from named options; TaskError for unknown names and wrong types, naming the known ones."""
        return cls(**check_options(cls.name, cls, options, TaskError))


@dataclass(frozen=True, slots=True)
class Laid:
    """Statements laid out in filler: the tokens, and where each statement begins."""

    tokens: Tokens
    starts: Tokens


def lay_out(
    rng: np.random.Generator,
    language: Language,
    statements: Sequence[Tokens],
    length: int,
    opening: Tokens = (),
) -> Laid:
    """Scatter `statements`, in the order given, through filler up to exactly `length` tokens.

    The text begins with the language's begin token and `opening`. Every gap between statements is equally likely
    to take a token of filler, except that a language may want to finish a sentence first.
    """
    head = (*language.begin, *opening)
    room = length - len(head) - sum(map(len, statements))
    if room < 0:
        raise language.too_short(length, length - room)
    cuts = np.sort(rng.integers(0, room + 1, len(statements))).tolist()
    filler = language.filler(rng, room)
    tokens = list(head)
    starts: list[int] = []
    done = 0
    for statement, cut in zip(statements, language.pauses(filler, cuts), strict=True):
        tokens += filler[done:cut]
        starts.append(len(tokens))
        tokens += statement
        done = cut
    tokens += filler[done:]
    return Laid(tuple(tokens), tuple(starts))


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement of the context, the question that can be asked about it, and the answer, which it spells out."""

    statement: Tokens
    prompt: Tokens
    answer: Tokens

    def question(self, start: int) -> Question:
        """The question about the statement that begins at position `start`."""
        first = start + find_last(self.statement, self.answer)
        return Question(self.prompt, self.answer, tuple(range(first, first + len(self.answer))))


def ask_all(rng: np.random.Generator, facts: Sequence[Fact], starts: Sequence[int]) -> tuple[Question, ...]:
    """One question about each of `facts`, whose statements begin at `starts`, in random order."""
    return tuple(facts[i].question(starts[i]) for i in rng.permutation(len(facts)).tolist())


def find_last(statement: Tokens, part: Tokens) -> int:
    """Where `part` stands in `statement` for the last time; TaskError if a language does not say what it answers."""
    for first in range(len(statement) - len(part), -1, -1):
        if statement[first : first + len(part)] == part:
            return first
    raise TaskError(f"the statement {statement} does not hold the tokens {part} of its answer")
