"""The token language of the built-in model: a marker opens every statement, and filler is an order-2 Markov text."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.tasks.language import Language, Tokens

BOS, KEY, QUERY, LINK, TRACE, COUNT, PASSAGE, CONTINUE = range(8)
NUM_MARKERS = 16  # the rest of them is kept for later
FIRST_FILLER, NUM_FILLER = 16, 16
FIRST_WORD, NUM_GROUPS, GROUP_SIZE = 32, 4, 8
FIRST_KEY = FIRST_WORD + NUM_GROUPS * GROUP_SIZE
STREAM_ROWS, STREAM_STEPS = 256, 4096
BURN_IN = 64


class TokenLanguage(Language):
    """Ids 0-7 are markers, 16-31 filler, 32-63 words to count; the rest is half keys, half values.

    `[KEY k v ..]` assigns, `[QUERY k]` asks; `[LINK a b]` says that b is assigned a, `[TRACE v]` asks for the chain
    that begins at v; `[COUNT w]` asks for the most frequent word of w's group; `[PASSAGE a b c ..]` is continued
    after `[CONTINUE a b]`. The filler's transition table is part of the language (seed 0), so that a model can
    learn it by heart.
    """

    begin: Tokens = (BOS,)
    num_groups = NUM_GROUPS

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < FIRST_KEY + 64:
            raise TaskError(f"the token language needs at least {FIRST_KEY + 64} token ids, not {vocab_size}")
        self.vocab_size = vocab_size
        self.num_symbols: int = (vocab_size - FIRST_KEY) // 2

    def keys(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """Ids of the first half, without repetition."""
        return self._pick(rng, count, FIRST_KEY, "keys")

    def values(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """Ids of the second half, without repetition."""
        return self._pick(rng, count, FIRST_KEY + self.num_symbols, "values")

    def _pick(self, rng: np.random.Generator, count: int, first: int, what: str) -> list[Tokens]:
        if count > self.num_symbols:
            raise TaskError(f"{count} different {what} are needed and the language has {self.num_symbols}")
        return [(first + int(i),) for i in rng.permutation(self.num_symbols)[:count]]

    def words(self, rng: np.random.Generator, group: int, count: int) -> list[Tokens]:
        """Ids of one group."""
        if count > GROUP_SIZE:
            raise TaskError(f"{count} different words of a group are needed and the language has {GROUP_SIZE}")
        first = FIRST_WORD + group * GROUP_SIZE
        return [(first + int(i),) for i in rng.permutation(GROUP_SIZE)[:count]]

    def assign(self, key: Tokens, values: Sequence[Tokens]) -> Tokens:
        """[KEY k v ..]."""
        return (KEY, *key, *self.answer(values))

    def ask(self, key: Tokens) -> Tokens:
        """[QUERY k]."""
        return (QUERY, *key)

    def link(self, source: Tokens, variable: Tokens) -> Tokens:
        """[LINK source variable]."""
        return (LINK, *source, *variable)

    def ask_links(self, value: Tokens) -> Tokens:
        """[TRACE value]."""
        return (TRACE, *value)

    def ask_count(self, group: int) -> Tokens:
        """[COUNT w] with the first word of the group."""
        return (COUNT, FIRST_WORD + group * GROUP_SIZE)

    def passage(self, symbols: Sequence[Tokens]) -> Tokens:
        """[PASSAGE a b c ..]."""
        return (PASSAGE, *self.answer(symbols))

    def ask_passage(self, opening: Sequence[Tokens]) -> Tokens:
        """[CONTINUE a b]."""
        return (CONTINUE, *self.answer(opening))

    def answer(self, symbols: Sequence[Tokens]) -> Tokens:
        """One symbol after the other."""
        return tuple(token for symbol in symbols for token in symbol)

    def filler(self, rng: np.random.Generator, count: int) -> list[int]:
        """A piece of a long Markov text that is the same in every process."""
        text = self._text
        start = int(rng.integers(0, len(text)))
        piece = text[start : start + count]
        while len(piece) < count:
            piece = np.concatenate([piece, text[: count - len(piece)]])
        return list(piece.tolist())

    @cached_property
    def _text(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        rng = np.random.default_rng(0)
        rows = rng.dirichlet(np.full(NUM_FILLER, 0.2), size=(NUM_FILLER, NUM_FILLER)).cumsum(-1)
        before, last = rng.integers(0, NUM_FILLER, (2, STREAM_ROWS))
        steps = np.empty((STREAM_STEPS, STREAM_ROWS), dtype=np.int64)
        for step in range(-BURN_IN, STREAM_STEPS):
            drawn = (rows[before, last] < rng.random((STREAM_ROWS, 1))).sum(-1).clip(max=NUM_FILLER - 1)
            before, last = last, drawn
            if step >= 0:
                steps[step] = drawn
        return FIRST_FILLER + steps.T.reshape(-1)
