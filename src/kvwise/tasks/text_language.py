"""The tasks as English text, in the tokens of a real model's tokenizer."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import product

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.tasks.language import Language, Tokens
from kvwise.tasks.words import ADJECTIVES, GROUPS, NOUNS, SENTENCES

SMALLEST, LARGEST = 1_000_000, 9_999_999  # values have seven digits, as RULER's numbers
# Text in front of a piece while it is encoded, so that the tokenizer knows that it continues something.
ANCHORS = ("a", "\n", "")
# Every letter, digit and sign that the sentences below use.
SPELLING = " One of the quick-brown foxes = VAR jumps, lazily:\nWhich? 1234567890 vwxyz."


class TextLanguage(Language):
    """Statements and questions after RULER's (arXiv 2404.06654, appendix B), filler of plain sentences.

    `encode` turns text into token ids without special tokens, `decode` turns them back; `begin` opens every context
    (such as the id of BOS). Text is encoded piece by piece and the tokens are joined, so that a value has the same
    tokens wherever it stands and contexts have the very number of tokens that was asked for. Filler begins in
    mid-sentence where it must, and statements stand between sentences. Keys and variables are pairs of an adjective
    and a noun; values are numbers.
    """

    num_symbols: int = len(ADJECTIVES) * len(NOUNS)
    num_groups = len(GROUPS)

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        begin: Sequence[int] = (),
    ) -> None:
        self.begin = tuple(begin)
        self._encode, self._decode = encode, decode
        self._piece = lru_cache(maxsize=1 << 16)(self._encode_piece)
        read = decode(self._piece(SPELLING))
        if "".join(read.split()) != "".join(SPELLING.split()):
            raise TaskError(
                f"this tokenizer reads {SPELLING!r} back as {read!r}: tasks as text need one that keeps English"
                " letters, digits and punctuation"
            )

    def _encode_piece(self, text: str) -> Tokens:
        """Tokens of `text` as it goes on from other text: no space is added in front, and none is lost."""
        for anchor in ANCHORS:
            head, whole = self._encode(anchor), self._encode(anchor + text)
            if whole[: len(head)] == head:
                return tuple(whole[len(head) :])
        return tuple(self._encode(text))

    def _join(self, *parts: str | Tokens) -> Tokens:
        return tuple(token for part in parts for token in (self._piece(part) if isinstance(part, str) else part))

    def keys(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """Such as ` quiet-harbour`."""
        self._check_count(count, "keys")
        picked = rng.permutation(self.num_symbols)[:count].tolist()
        names = list(product(ADJECTIVES, NOUNS))
        return self._symbols([f" {names[i][0]}-{names[i][1]}" for i in picked])

    def values(self, rng: np.random.Generator, count: int) -> list[Tokens]:
        """Numbers of seven digits."""
        self._check_count(count, "values")
        drawn: dict[int, None] = {}  # in the order drawn
        while len(drawn) < count:
            drawn[int(rng.integers(SMALLEST, LARGEST + 1))] = None
        return self._symbols([f" {number}" for number in drawn])

    def words(self, rng: np.random.Generator, group: int, count: int) -> list[Tokens]:
        """Animals, fruit, metals, instruments."""
        _, known = GROUPS[group]
        if count > len(known):
            raise TaskError(f"{count} different words of a group are needed and the language has {len(known)}")
        return self._symbols([f" {known[i]}" for i in rng.permutation(len(known))[:count].tolist()])

    def _check_count(self, count: int, what: str) -> None:
        if count > self.num_symbols:
            raise TaskError(f"{count} different {what} are needed and the language has {self.num_symbols}")

    def _symbols(self, texts: Sequence[str]) -> list[Tokens]:
        symbols = [self._piece(text) for text in texts]
        if len(set(symbols)) < len(symbols):
            raise TaskError("this tokenizer writes different words with the same tokens: tasks as text need another")
        return symbols

    def assign(self, key: Tokens, values: Sequence[Tokens]) -> Tokens:
        """RULER's needle for one value; a list of them in one sentence for several."""
        if len(values) == 1:
            return self._join(" One of the special magic numbers for", key, " is:", values[0], ".")
        return self._join(" The special magic numbers for", key, " are:", self.answer(values), ".")

    def ask(self, key: Tokens) -> Tokens:
        """Ends with the beginning of an answer, as RULER's questions do."""
        question = "\nQuestion: What does the text say last about the special magic numbers for"
        return self._join(question, key, "?\nAnswer: The special magic numbers for", key, " are:")

    def exchange(self, key: Tokens, values: Sequence[Tokens]) -> Tokens:
        """As in Language, with a full stop."""
        return self._join(self.ask(key), self.answer(values), ".")

    def link(self, source: Tokens, variable: Tokens) -> Tokens:
        """`VAR variable = 1234567.` or `VAR variable = VAR other.`"""
        of = " = VAR" if not self._decode(source).strip().isdigit() else " ="
        return self._join(" VAR", variable, of, source, ".")

    def ask_links(self, value: Tokens) -> Tokens:
        """The order asked for is that of the chain."""
        question = "\nQuestion: Which variables have the value"
        rest = ", directly or through another variable? Name them in the order in which they got it.\nAnswer: They are"
        return self._join(question, value, rest)

    def mention(self, word: Tokens) -> Tokens:
        """A sentence with the word at its end."""
        return self._join(" Somebody wrote down the word", word, ".")

    def ask_count(self, group: int) -> Tokens:
        """Asks for an animal, a fruit, ..."""
        kind, _ = GROUPS[group]
        return self._join(f"\nQuestion: Which {kind} was written down most often?\nAnswer: It was the word")

    def passage(self, symbols: Sequence[Tokens]) -> Tokens:
        """A list of numbers."""
        return self._join(" Here is a sequence of numbers:", self.answer(symbols), ".")

    def ask_passage(self, opening: Sequence[Tokens]) -> Tokens:
        """Ends with the opening and a comma, to be continued."""
        question = "\nQuestion: How does the sequence of numbers go on that begins with"
        return self._join(question, self.answer(opening), "?\nAnswer:", self.answer(opening), ",")

    def answer(self, symbols: Sequence[Tokens]) -> Tokens:
        """With commas between them."""
        parts: list[str | Tokens] = []
        for symbol in symbols:
            parts += [",", symbol] if parts else [symbol]
        return self._join(*parts)

    def filler(self, rng: np.random.Generator, count: int) -> list[int]:
        """Sentences in random order; the first is cut off in front, so that the last is whole."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self._sentences[int(rng.integers(len(self._sentences)))]
        return tokens[len(tokens) - count :]

    def pauses(self, filler: Sequence[int], cuts: Sequence[int]) -> Sequence[int]:
        """The next end of a sentence."""
        found: list[int] = []
        place = 0
        for cut in cuts:
            place = max(place, cut)
            while place < len(filler) and (place == 0 or filler[place - 1] not in self._ends):
                place += 1
            found.append(place)
        return found

    @cached_property
    def _sentences(self) -> tuple[Tokens, ...]:
        return tuple(self._piece(f" {sentence}") for sentence in SENTENCES)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(sentence[-1] for sentence in self._sentences)
