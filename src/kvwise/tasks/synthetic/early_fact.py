"""Early fact: what was said at the start of a conversation, asked back after many turns."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Fact, Task, ask_all, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class EarlyFact(Task):
    """Early-fact retention (arXiv 2604.05012): `num_facts` facts open the conversation.

    The turns that follow each give a fact of their own, talk on, and have it asked and answered at once, so that
    attention has had every reason to turn to what is recent. Then the first facts are asked back.
    """

    num_facts: int = 4

    name: ClassVar[str] = "early_fact"
    idea: ClassVar[str] = "facts from the start of a conversation, asked back after its turns"
    source: ClassVar[str] = "arXiv 2604.05012"

    def __post_init__(self) -> None:
        self.require("num_facts", self.num_facts >= 1, "at least 1")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every early fact is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, 1))
        turns = max(1, language.num_facts(length, sample, symbols=1) // 3)
        keys, values = language.keys(rng, turns + self.num_facts), language.values(rng, turns + self.num_facts)
        facts = [
            Fact(language.assign(key, [value]), language.ask(key), language.answer([value]))
            for key, value in zip(keys, values, strict=True)
        ]
        opening = tuple(token for fact in facts[: self.num_facts] for token in fact.statement)
        said = []
        for i in range(self.num_facts, self.num_facts + turns):
            said += [facts[i].statement, language.exchange(keys[i], [values[i]])]
        laid = lay_out(rng, language, said, length, opening)
        sizes = [len(fact.statement) for fact in facts[: self.num_facts]]
        starts = [len(language.begin) + sum(sizes[:i]) for i in range(self.num_facts)]
        return Episode(laid.tokens, ask_all(rng, facts[: self.num_facts], starts))
