"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from kvwise.core.output import TokenLogprob
from kvwise.models.text import Detokenizer, Tokenizer

LOWEST = -9999.0  # how OpenAI writes minus infinity


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""
    return {"content": [_chat_token(tokenizer, one) for one in logprobs], "refusal": None}


def _chat_token(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    top = [_named(tokenizer, token, value) for token, value in one.top.items()]
    return {**_named(tokenizer, one.token_id, one.logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": name(data), "logprob": number(logprob), "bytes": list(data)}


def name(data: bytes) -> str:
    """A token as text; one that is only a part of a character is spelled in OpenAI's way, `bytes:\\xe4`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def number(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LOWEST) if isfinite(logprob) else LOWEST


class CompletionLogprobs:
    """`choices[].logprobs` of one sample of a completion, piece by piece; offsets are characters of its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer)
        self._offset = 0

    def add(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The entries of further tokens."""
        names = [self._name(one.token_id) for one in logprobs]
        return {
            "tokens": names,
            "token_logprobs": [number(one.logprob) for one in logprobs],
            "top_logprobs": [self._top(one) for one in logprobs],
            "text_offset": [self._start(one.token_id, name) for one, name in zip(logprobs, names, strict=True)],
        }

    def _start(self, token_id: int, name: str) -> int:
        """Where a token begins; what was held back before it, for it could have become a character, is text by now."""
        before, piece = self._offset, self._text.add([token_id])
        self._offset += len(piece)
        return self._offset - len(name) if piece.endswith(name) else before

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one; of tokens with one name the likelier stays."""
        found: dict[str, float] = {}
        for token, value in (*one.top.items(), (one.token_id, one.logprob)):
            found.setdefault(self._name(token), number(value))
        return found

    def _name(self, token_id: int) -> str:
        return name(self._tokenizer.token_bytes(token_id))
