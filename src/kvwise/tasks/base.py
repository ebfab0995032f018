"""The seam of tasks: a context, questions about it, and the tokens that answer them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

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

    An exact task has one right answer; the other kind (`exact = False`) has a likely continuation and is judged by
    its negative log-likelihood alone.
    """

    name: ClassVar[str]
    idea: ClassVar[str]
    source: ClassVar[str]
    exact: ClassVar[bool] = True

    @abstractmethod
    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """An episode whose context has exactly `length` tokens; TaskError if that is too short for the task."""


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
    to take a token of filler.
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
    for statement, cut in zip(statements, cuts, strict=True):
        tokens += filler[done:cut]
        starts.append(len(tokens))
        tokens += statement
        done = cut
    tokens += filler[done:]
    return Laid(tuple(tokens), tuple(starts))
