"""Recall: many keys with one value each, some of them asked for."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, lay_out
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
        slots = [language.assign(key, [value]) for key, value in zip(keys, values, strict=True)]
        laid = lay_out(rng, language, slots, length)
        questions = []
        for i in rng.permutation(count).tolist():
            answer = language.answer([values[i]])
            end = laid.starts[i] + len(slots[i])
            questions.append(Question(language.ask(keys[i]), answer, tuple(range(end - len(answer), end))))
        return Episode(laid.tokens, tuple(questions))
