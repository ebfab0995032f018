"""Continuation: how likely is the filler that follows?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task
from kvwise.tasks.language import Language

MOST = 65536  # tokens of an answer; more is a slip of the pen


@dataclass(frozen=True)
class Continuation(Task):
    """Next-token loss on `num_tokens` tokens of filler. It needs the latest tokens only: the easiest of all."""

    num_tokens: int = 16

    name: ClassVar[str] = "continuation"
    idea: ClassVar[str] = "next-token loss on filler"
    source: ClassVar[str] = "language modelling"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require("num_tokens", 1 <= self.num_tokens <= MOST, f"1 to {MOST}")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """One question without words: the text goes on."""
        room = length - len(language.begin)
        if room < 1:
            raise language.too_short(length, length - room + 1)
        filler = language.filler(rng, room + self.num_tokens)
        context = (*language.begin, *filler[:room])
        return Episode(context, (Question((), tuple(filler[room:])),))
