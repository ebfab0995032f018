"""Forgetting: keys are assigned again, and only the last value counts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task, ask_all, lay_out
from kvwise.tasks.language import Language

MOST = 1000  # assignments of a key; more is a slip of the pen


@dataclass(frozen=True)
class Forgetting(Task):
    """Recall in which a key is assigned up to `most` times; the last assignment wins."""

    most: int = 3

    name: ClassVar[str] = "forgetting"
    idea: ClassVar[str] = "the last value of keys assigned several times"
    source: ClassVar[str] = "kvwise"

    def __post_init__(self) -> None:
        self.require("most", 1 <= self.most <= MOST, f"1 to {MOST}")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every key is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, 1))
        count = language.num_facts(length, sample, symbols=1)
        owners = self._owners(rng, count)
        keys, values = language.keys(rng, max(owners) + 1), language.values(rng, count)
        facts = [
            Fact(language.assign(keys[owner], [value]), language.ask(keys[owner]), language.answer([value]))
            for owner, value in zip(owners, values, strict=True)
        ]
        laid = lay_out(rng, language, [fact.statement for fact in facts], length)
        last = {owner: i for i, owner in enumerate(owners)}
        asked = [last[owner] for owner in range(len(last))]
        return Episode(laid.tokens, ask_all(rng, [facts[i] for i in asked], [laid.starts[i] for i in asked]))

    def _owners(self, rng: np.random.Generator, count: int) -> list[int]:
        """Which key each of `count` assignments belongs to: 1 to `most` of them a key, in random order."""
        owners: list[int] = []
        while len(owners) < count:
            times = min(int(rng.integers(1, self.most + 1)), count - len(owners))
            owners += [max(owners, default=-1) + 1] * times
        return list(rng.permutation(owners).tolist())
