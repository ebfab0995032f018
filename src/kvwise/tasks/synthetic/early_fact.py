"""Early fact: what was said at the start of a conversation, asked back after many turns."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, lay_out
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

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every early fact is asked once, in random order."""
        sample = language.assign(language.keys(rng, 1)[0], language.values(rng, 1))
        turns = max(1, language.num_facts(length, sample, symbols=1) // 3)
        keys, values = language.keys(rng, turns + self.num_facts), language.values(rng, turns + self.num_facts)
        slots = [language.assign(key, [value]) for key, value in zip(keys, values, strict=True)]
        opening = tuple(token for slot in slots[: self.num_facts] for token in slot)
        said = []
        for i in range(self.num_facts, self.num_facts + turns):
            said += [slots[i], (*language.ask(keys[i]), *language.answer([values[i]]))]
        laid = lay_out(rng, language, said, length, opening)
        questions = []
        for i in rng.permutation(self.num_facts).tolist():
            answer = language.answer([values[i]])
            end = len(language.begin) + sum(map(len, slots[: i + 1]))
            questions.append(Question(language.ask(keys[i]), answer, tuple(range(end - len(answer), end))))
        return Episode(laid.tokens, tuple(questions))
