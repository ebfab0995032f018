"""Copy: passages of symbols, to be continued word for word."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task, ask_all, lay_out
from kvwise.tasks.language import Language

OPENING = 2  # symbols of a passage that the question gives


@dataclass(frozen=True)
class Copy(Task):
    """Passages of `num_symbols` symbols; given the first two, the rest is asked, and must be right as a whole."""

    num_symbols: int = 10

    name: ClassVar[str] = "copy"
    idea: ClassVar[str] = "passages continued word for word"
    source: ClassVar[str] = "induction; Olsson et al., arXiv 2209.11895"

    def __post_init__(self) -> None:
        self.require("num_symbols", self.num_symbols > OPENING, f"more than {OPENING}, which the question gives")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every passage is asked once, in random order."""
        sample = language.passage(language.values(rng, self.num_symbols))
        count = language.num_facts(length, sample, symbols=self.num_symbols)
        symbols = language.values(rng, count * self.num_symbols)
        texts = [symbols[i * self.num_symbols : (i + 1) * self.num_symbols] for i in range(count)]
        facts = [
            Fact(language.passage(text), language.ask_passage(text[:OPENING]), language.answer(text[OPENING:]))
            for text in texts
        ]
        laid = lay_out(rng, language, [fact.statement for fact in facts], length)
        return Episode(laid.tokens, ask_all(rng, facts, laid.starts))
