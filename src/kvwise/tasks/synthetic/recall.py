"""Recall: many keys with one value each, some of them asked for."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task, ask_all, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall (MQAR; zoology, arXiv 2312.04927 section 4) with filler between the pairs."""

    name: ClassVar[str] = "recall"
    idea: ClassVar[str] = "the value of each key"
    source: ClassVar[str] = "MQAR, arXiv 2312.04927"

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every key is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, 1))
        count = language.num_facts(length, sample, symbols=1)
        keys, values = language.keys(rng, count), language.values(rng, count)
        facts = [
            Fact(language.assign(key, [value]), language.ask(key), language.answer([value]))
            for key, value in zip(keys, values, strict=True)
        ]
        laid = lay_out(rng, language, [fact.statement for fact in facts], length)
        return Episode(laid.tokens, ask_all(rng, facts, laid.starts))
