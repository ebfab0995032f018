"""Copy: passages of symbols, to be continued word for word."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, lay_out
from kvwise.tasks.language import Language

OPENING = 2  # symbols of a passage that the question gives


@dataclass(frozen=True)
class Copy(Task):
    """Passages of `num_symbols` symbols; given the first two, the rest is asked, and must be right as a whole."""

    num_symbols: int = 10

    name: ClassVar[str] = "copy"
    idea: ClassVar[str] = "passages continued word for word"
    source: ClassVar[str] = "induction; Olsson et al., arXiv 2209.11895"

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every passage is asked once, in random order."""
        sample = language.passage(language.values(rng, self.num_symbols))
        count = language.num_facts(length, sample, symbols=self.num_symbols)
        symbols = language.values(rng, count * self.num_symbols)
        texts = [symbols[i * self.num_symbols : (i + 1) * self.num_symbols] for i in range(count)]
        slots = [language.passage(text) for text in texts]
        laid = lay_out(rng, language, slots, length)
        questions = []
        for i in rng.permutation(count).tolist():
            answer = language.answer(texts[i][OPENING:])
            end = laid.starts[i] + len(slots[i])
            question = language.ask_passage(texts[i][:OPENING])
            questions.append(Question(question, answer, tuple(range(end - len(answer), end))))
        return Episode(laid.tokens, tuple(questions))
