"""Counting: which word of each group comes most often?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, find_last, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Counting(Task):
    """Frequent words (RULER, arXiv 2404.06654 section 3), asked group by group.

    RULER asks for the three or ten most frequent words of all, in any order; one word a group has one right answer.
    In each group `num_words` words occur; the most frequent one takes `share` of the occurrences, the others divide
    the rest evenly. The evidence is spread over the whole text, so that what is dropped blurs the answer but does
    not take it away.
    """

    num_words: int = 4
    share: float = 0.4

    name: ClassVar[str] = "counting"
    idea: ClassVar[str] = "the most frequent word of each group"
    source: ClassVar[str] = "after RULER frequent words, arXiv 2404.06654"

    def __post_init__(self) -> None:
        self.require("num_words", self.num_words >= 2, "at least 2")
        self.require("share", 0 < self.share <= 1, "above 0 and at most 1")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every group is asked once."""
        groups = [language.words(rng, group, self.num_words) for group in range(language.num_groups)]
        cost = max(len(language.mention(word)) for words in groups for word in words)
        each = max(4, 3 * length // (16 * cost * language.num_groups))
        most = max(each // self.num_words + 2, round(each * self.share))
        said = []
        for group, words in enumerate(groups):
            rest = [words[1 + i % (self.num_words - 1)] for i in range(each - most)]
            said += [(group, word) for word in [words[0]] * most + rest]
        order = rng.permutation(len(said)).tolist()
        laid = lay_out(rng, language, [language.mention(said[i][1]) for i in order], length)
        questions = []
        for group in rng.permutation(language.num_groups).tolist():
            word = groups[group][0]
            answer = language.answer([word])
            within = find_last(language.mention(word), word)
            evidence = tuple(
                start + within + offset
                for start, i in zip(laid.starts, order, strict=True)
                if said[i] == (group, word)
                for offset in range(len(word))
            )
            questions.append(Question(language.ask_count(group), answer, evidence))
        return Episode(laid.tokens, tuple(questions))
