"""Needle: one fact in a long text, at a given depth."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.tasks.base import Episode, Question, Task
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Needle(Task):
    """Passkey retrieval (RULER's single needle, arXiv 2404.06654 section 3): one key with four values.

    `depth` 0 puts it at the beginning, 1 at the end; None draws it anew for every episode.
    """

    depth: float | None = None
    num_values: int = 4

    name: ClassVar[str] = "needle"
    idea: ClassVar[str] = "one fact in a long text"
    source: ClassVar[str] = "RULER single needle, arXiv 2404.06654"

    def __post_init__(self) -> None:
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise TaskError(f"needle: depth={self.depth} is out of range: it must be 0 (beginning) to 1 (end)")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """One question."""
        key, values = language.keys(rng, 1)[0], language.values(rng, self.num_values)
        slot = language.assign(key, values)
        room = length - len(language.begin) - len(slot)
        if room < 0:
            raise language.too_short(length, length - room)
        depth = float(rng.random()) if self.depth is None else self.depth
        before = round(depth * room)
        filler = language.filler(rng, room)
        context = (*language.begin, *filler[:before], *slot, *filler[before:])
        answer = language.answer(values)
        end = len(language.begin) + before + len(slot)
        question = Question(language.ask(key), answer, tuple(range(end - len(answer), end)))
        return Episode(context, (question,))
