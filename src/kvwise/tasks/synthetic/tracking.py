"""Tracking: a value is assigned to a variable, that one to the next, and so on; who has the value?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, find_last, lay_out
from kvwise.tasks.language import Language, Tokens

MOST = 1000  # hops of a chain; more is a slip of the pen


@dataclass(frozen=True)
class Tracking(Task):
    """Variable tracking (RULER, arXiv 2404.06654 section 3): chains of `fewest` to `most` hops among one another.

    Asked for the variables that have a value; the answer names them in the order of the chain. RULER asks for one
    chain of four hops, with the variables in any order.
    """

    fewest: int = 2
    most: int = 4

    name: ClassVar[str] = "tracking"
    idea: ClassVar[str] = "every variable that has a value through 2 to 4 hops"
    source: ClassVar[str] = "RULER variable tracking, arXiv 2404.06654"

    def __post_init__(self) -> None:
        self.require("fewest", self.fewest >= 1, "at least 1")
        self.require("most", self.fewest <= self.most <= MOST, f"from fewest={self.fewest} to {MOST}")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """Every chain is asked for once, in random order; the links of a chain stand in their order."""
        count = language.num_facts(length, language.link(*language.keys(rng, 2)), symbols=1)
        hops = self._hops(rng, count)
        values, variables = language.values(rng, len(hops)), language.keys(rng, sum(hops))
        chains, done = [], 0
        for value, n in zip(values, hops, strict=True):
            chains.append([value, *variables[done : done + n]])
            done += n
        owners = rng.permutation([c for c, n in enumerate(hops) for _ in range(n)]).tolist()
        slots, places = self._slots(language, chains, owners)
        laid = lay_out(rng, language, slots, length)
        questions = []
        for c in rng.permutation(len(chains)).tolist():
            evidence = tuple(
                laid.starts[i] + find_last(slots[i], symbol) + offset
                for symbol, i in zip(chains[c][1:], places[c], strict=True)
                for offset in range(len(symbol))
            )
            questions.append(Question(language.ask_links(chains[c][0]), language.answer(chains[c][1:]), evidence))
        return Episode(laid.tokens, tuple(questions))

    def _hops(self, rng: np.random.Generator, count: int) -> list[int]:
        """Lengths of chains that together have about `count` links; at least one chain."""
        hops = [int(rng.integers(self.fewest, self.most + 1))]
        while sum(hops) + self.most <= count:
            hops.append(int(rng.integers(self.fewest, self.most + 1)))
        return hops

    @staticmethod
    def _slots(
        language: Language, chains: list[list[Tokens]], owners: list[int]
    ) -> tuple[list[Tokens], list[list[int]]]:
        """The statements in text order, and for each chain the places of its links among them."""
        slots: list[Tokens] = []
        places: list[list[int]] = [[] for _ in chains]
        for owner in owners:
            hop = len(places[owner])
            places[owner].append(len(slots))
            slots.append(language.link(chains[owner][hop], chains[owner][hop + 1]))
        return slots, places
