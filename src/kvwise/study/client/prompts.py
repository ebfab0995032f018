"""The requests of a run, as values: conversations of one or more turns, and what makes their prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvwise.study.client.vocabulary import Vocabulary

Message = dict[str, str]
Prompt = str | list[int] | list[Message]
DEFAULT_OUTPUT = 128


@dataclass(frozen=True, slots=True)
class Ask:
    """One turn. `prompt` makes it when it is about to be sent: a trace's prompts together can fill the memory."""

    prompt: Callable[[], Prompt]
    num_prompt: int | None  # its own tokens, without the history; None: nobody knows
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each sent `think_s` after the answer to the one before it. `at` is seconds from the start."""

    index: int
    at: float
    turns: tuple[Ask, ...]
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes prompts of random numbers, as the endpoint takes them."""

    vocabulary: Vocabulary
    is_chat: bool

    @property
    def by_ids(self) -> bool:
        """Whether prompts are token ids."""
        return self.vocabulary.prefers_ids and not self.is_chat

    def ask(self, numbers: Callable[[], np.ndarray], length: int, max_tokens: int, *, text: bool = False) -> Ask:
        """A turn of `length` random tokens; as text if it is to have a history."""
        exact = self.by_ids and not text
        make = self.vocabulary.ids if exact else self.vocabulary.text
        return Ask(lambda: make(numbers().tolist()), length, max_tokens)

    def ask_text(self, text: str, max_tokens: int) -> Ask:
        """A turn of a given text."""
        return Ask(lambda: text, self.vocabulary.count(text), max_tokens)
