"""What random prompts are made of: numbers below `size` become text, or token ids, and back to a count."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from kvwise.core.errors import UsageError

_PRINTABLE = range(32, 127)  # as bytes; low ids are single characters in most vocabularies, so they are safe as ids
_COMMON_WORDS = """the of and to in is you that it he was for on are as with his they at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if will up other about out
many then them these so some her would make like him into time has look two more write go see number no way could people
my than first water been call who oil its now find long down day did get come made may part"""
_WORDS = _COMMON_WORDS.split()[: len(_PRINTABLE)]
BYTES = "bytes"


class Vocabulary(Protocol):
    """Makes prompts of numbers from 0 to `size` - 1, one token each as well as it knows."""

    size: int
    prefers_ids: bool  # whether /v1/completions gets ids rather than text

    def text(self, numbers: Sequence[int]) -> str:
        """Text of them."""
        ...

    def ids(self, numbers: Sequence[int]) -> list[int]:
        """Token ids of them."""
        ...

    def count(self, text: str) -> int | None:
        """Tokens of a text; None: nobody knows here."""
        ...


class Common:
    """Without a tokenizer: ids that every vocabulary has, and words that are one token in most."""

    size = len(_PRINTABLE)
    prefers_ids = True

    def text(self, numbers: Sequence[int]) -> str:
        """Words."""
        return " ".join(_WORDS[number] for number in numbers)

    def ids(self, numbers: Sequence[int]) -> list[int]:
        """Ids 32 to 126."""
        return [_PRINTABLE[number] for number in numbers]

    def count(self, text: str) -> int | None:
        """Unknown."""
        return None


class Bytes:
    """A byte is a token, as in kvwise's own random models."""

    size = len(_PRINTABLE)
    prefers_ids = False

    def text(self, numbers: Sequence[int]) -> str:
        """Printable characters."""
        return bytes(self.ids(numbers)).decode()

    def ids(self, numbers: Sequence[int]) -> list[int]:
        """Bytes."""
        return [_PRINTABLE[number] for number in numbers]

    def count(self, text: str) -> int | None:
        """Bytes."""
        return len(text.encode(errors="replace"))


class Hub:
    """A tokenizer in the format of the Hugging Face hub."""

    prefers_ids = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        self._ids = [token for token in range(tokenizer.vocab_size) if token not in special]
        self.size = len(self._ids)

    def text(self, numbers: Sequence[int]) -> str:
        """What they decode to; read again it may have a few tokens more or less."""
        return str(self._tokenizer.decode(self.ids(numbers)))

    def ids(self, numbers: Sequence[int]) -> list[int]:
        """Ids that are not special."""
        return [self._ids[number] for number in numbers]

    def count(self, text: str) -> int | None:
        """Tokens, without special ones around them."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def load_vocabulary(name: str | None) -> Vocabulary:
    """`bytes`, a folder or a hub id; None: no tokenizer. UsageError if it cannot be had."""
    if name is None:
        return Common()
    if name == BYTES:
        return Bytes()
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", name):
        raise UsageError(f"tokenizer {name!r} is no folder and no hub id; `bytes` counts bytes")
    try:
        from transformers import AutoTokenizer

        return Hub(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"tokenizer {name!r} cannot be loaded: {reason}") from error
