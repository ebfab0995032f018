"""Forgetting: keys are assigned again, and only the last value counts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Forgetting(Task):
    """Recall in which a key is assigned up to `most` times; the last assignment wins."""

    most: int = 3

    name: ClassVar[str] = "forgetting"
    idea: ClassVar[str] = "the last value of keys assigned several times"
    source: ClassVar[str] = "kvwise"

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every key is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, 1))
        count = language.num_facts(length, sample, symbols=1)
        owners = self._owners(rng, count)
        keys, values = language.keys(rng, max(owners) + 1), language.values(rng, count)
        slots = [language.assign(keys[owner], [value]) for owner, value in zip(owners, values, strict=True)]
        laid = lay_out(rng, language, slots, length)
        last = {owner: i for i, owner in enumerate(owners)}
        questions = []
        for owner in rng.permutation(len(last)).tolist():
            i = last[owner]
            answer = language.answer([values[i]])
            end = laid.starts[i] + len(slots[i])
            questions.append(Question(language.ask(keys[owner]), answer, tuple(range(end - len(answer), end))))
        return Episode(laid.tokens, tuple(questions))

    def _owners(self, rng: np.random.Generator, count: int) -> list[int]:
        """Which key each of `count` assignments belongs to: 1 to `most` of them a key, in random order."""
        owners: list[int] = []
        while len(owners) < count:
            times = min(int(rng.integers(1, self.most + 1)), count - len(owners))
            owners += [max(owners, default=-1) + 1] * times
        return list(rng.permutation(owners).tolist())
