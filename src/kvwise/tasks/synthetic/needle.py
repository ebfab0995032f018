"""Needle: one fact in a long text, at a given depth."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Needle(Task):
    """Passkey retrieval (RULER's single needle, arXiv 2404.06654 section 3): one key, here with several
    values, so that fewer are guessed.

    `depth` 0 puts it at the beginning, 1 at the end; None draws it anew for every episode.
    """

    depth: float | None = None
    num_values: int = 4

    name: ClassVar[str] = "needle"
    idea: ClassVar[str] = "one fact in a long text"
    source: ClassVar[str] = "RULER single needle, arXiv 2404.06654"

    def __post_init__(self) -> None:
        self.require("depth", self.depth is None or 0 <= self.depth <= 1, "0 (beginning) to 1 (end)")
        self.require("num_values", self.num_values >= 1, "at least 1")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """One question."""
        key, values = language.keys(rng, 1)[0], language.values(rng, self.num_values)
        fact = Fact(language.assign(key, values), language.ask(key), language.answer(values))
        room = length - len(language.begin) - len(fact.statement)
        if room < 0:
            raise language.too_short(length, length - room)
        depth = float(rng.random()) if self.depth is None else self.depth
        filler = language.filler(rng, room)
        (before,) = language.pauses(filler, [round(depth * room)])
        context = (*language.begin, *filler[:before], *fact.statement, *filler[before:])
        return Episode(context, (fact.question(len(language.begin) + before),))
