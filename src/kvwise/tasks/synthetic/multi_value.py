"""Multi-value: keys with several values each; an answer is right only if all of them are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task, ask_all, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class MultiValue(Task):
    """Keys with `num_values` values, said together and in order.

    RULER's multi-value needles (arXiv 2404.06654 section 3) stand apart in the text and may be named in any order;
    here they stand together, because the order makes the one right answer that a forced continuation can be scored
    against.
    """

    num_values: int = 4

    name: ClassVar[str] = "multi_value"
    idea: ClassVar[str] = "all values of each key"
    source: ClassVar[str] = "after RULER, arXiv 2404.06654"

    def __post_init__(self) -> None:
        self.require("num_values", self.num_values >= 1, "at least 1")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every key is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, self.num_values))
        count = language.num_facts(length, sample, symbols=self.num_values)
        keys = language.keys(rng, count)
        values = language.values(rng, count * self.num_values)
        groups = [values[i * self.num_values : (i + 1) * self.num_values] for i in range(count)]
        facts = [
            Fact(language.assign(key, group), language.ask(key), language.answer(group))
            for key, group in zip(keys, groups, strict=True)
        ]
        laid = lay_out(rng, language, [fact.statement for fact in facts], length)
        return Episode(laid.tokens, ask_all(rng, facts, laid.starts))
