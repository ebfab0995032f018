"""Continuation: how likely is the filler that follows?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Continuation(Task):
    """Next-token loss on `num_tokens` tokens of filler. It needs the latest tokens only: the easiest of all."""

    num_tokens: int = 16

    name: ClassVar[str] = "continuation"
    idea: ClassVar[str] = "next-token loss on filler"
    source: ClassVar[str] = "language modelling"
    exact: ClassVar[bool] = False

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """One question without words: the text goes on."""
        room = length - len(language.begin)
        filler = language.filler(rng, room + self.num_tokens)
        context = (*language.begin, *filler[:room])
        return Episode(context, (Question((), tuple(filler[room:])),))
