"""Text on both ends of the engine, which itself speaks token ids only."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from kvwise.core.errors import UsageError

NUM_BYTES = 256
BOS, EOS, PAD = 256, 257, 258
_BLANK, _BYTE_NAME = "▁", re.compile("<0x[0-9A-F]{2}>")
UNFINISHED = "�"  # what decoding writes for bytes that are no character, or not yet one


class Tokenizer(Protocol):
    """The small face kvwise needs of a tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special` what the model expects around it (such as BOS)."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`; bytes that are no character become U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation of {"role", "content"}, ready for the assistant's answer."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation; `chat` is `encode_chat` of it. May run a program of the model's author."""
        ...

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a conversation's text."""
        ...

    def special_in(self, text: str) -> str | None:
        """The first special token that `text` spells, so that encoding makes it one; None if it spells none."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, by itself; of a special one, its name."""
        ...


@cache
def byte_letters() -> Mapping[str, int]:
    """The letter that stands for each byte in vocabularies like GPT-2's: printable Latin-1 for itself, others above."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(NUM_BYTES + i): byte for i, byte in enumerate(others)}


class ByteTokenizer:
    """UTF-8 bytes are tokens 0-255, then BOS 256, EOS 257, PAD 258; higher ids are padding of the vocabulary.

    `vocab_size` is the model's. Text needs at least 259 ids (`encode` raises UsageError otherwise); token ids
    of any vocabulary decode. Padding ids decode as `<|id|>`, as do BOS, EOS and PAD unless skipped.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        special = vocab_size > PAD
        self.bos_token_id: int | None = BOS if special else None
        self.eos_token_id: int | None = EOS if special else None
        self.pad_token_id: int | None = PAD if special else None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Bytes of `text`, after BOS with `add_special`. A lone surrogate is refused: it has no bytes."""
        if self.bos_token_id is None:
            raise UsageError(
                f"the model's vocabulary of {self.vocab_size} tokens cannot carry text as bytes"
                f" (that takes {PAD + 1}): give the prompt as token ids"
            )
        try:
            data = list(text.encode())
        except UnicodeEncodeError as error:
            raise UsageError(f"the text has a lone surrogate at character {error.start}: it is not Unicode") from None
        return [self.bos_token_id, *data] if add_special else data

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See Tokenizer."""
        data = bytearray()
        for token in token_ids:
            if token < NUM_BYTES:
                data.append(token)
            elif token > PAD or not skip_special:
                data += f"<|{token}|>".encode()
        return data.decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See Tokenizer."""
        return self.encode_chat(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """`role: content` lines. A template as plain as the tokenizer."""
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return f"{turns}assistant: "

    def encode_chat(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self.encode(text)

    def special_in(self, text: str) -> str | None:
        """None: text is bytes, whatever it spells."""
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return bytes([token_id]) if token_id < NUM_BYTES else f"<|{token_id}|>".encode()


class MarkedByteTokenizer(ByteTokenizer):
    """A byte tokenizer in which some texts stand for one token each: `marks`, such as {"<image>": 259}."""

    def __init__(self, vocab_size: int, marks: Mapping[str, int]) -> None:
        super().__init__(vocab_size)
        self._marks = dict(marks)
        self._pattern = re.compile("|".join(f"({re.escape(mark)})" for mark in marks))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """As ByteTokenizer, but a mark is its token."""
        tokens = super().encode("", add_special=add_special)
        start = 0
        for found in self._pattern.finditer(text):
            tokens += super().encode(text[start : found.start()], add_special=False)
            tokens.append(self._marks[found.group()])
            start = found.end()
        return tokens + super().encode(text[start:], add_special=False)

    def special_in(self, text: str) -> str | None:
        """The first mark in `text`."""
        found = self._pattern.search(text)
        return None if found is None else found.group()

    def name(self, token: int) -> str:
        """The mark that stands for `token`."""
        return next(mark for mark, value in self._marks.items() if value == token)


class HuggingFaceTokenizer:
    """A tokenizer of transformers behind the small face."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.bos_token_id: int | None = inner.bos_token_id
        self.eos_token_id: int | None = inner.eos_token_id
        self.pad_token_id: int | None = inner.pad_token_id
        known = getattr(inner, "added_tokens_decoder", {}).values()
        self._special = [str(one) for one in known if one.special]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """See Tokenizer."""
        try:
            return list(self.inner.encode(text, add_special_tokens=add_special))
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"the tokenizer cannot read this text: {error}") from None

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See Tokenizer."""
        text: str = self.inner.decode(token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See `render`."""
        return self.encode_chat(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """By the model's own template; a missing or broken one is a UsageError."""
        if not self.inner.chat_template:
            raise UsageError("the model has no chat template: send the prompt as plain text instead of messages")
        try:
            text: str = self.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise UsageError(f"the model's chat template failed on these messages: {error}") from error
        return text

    def encode_chat(self, text: str) -> list[int]:
        """Nothing is added: a template writes the special tokens itself."""
        return self.encode(text, add_special=False)

    def special_in(self, text: str) -> str | None:
        """See Tokenizer."""
        found = [(at, name) for name in self._special if (at := text.find(name)) >= 0]
        return min(found)[1] if found else None

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer. Vocabularies of bytes (GPT-2's letters, or `<0xE4>`) tell bytes that are no character."""
        name: str | None = self.inner.convert_ids_to_tokens(token_id)
        if name is None:
            return b""
        if _BYTE_NAME.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if _BLANK in name and name not in self._special:  # sentencepiece's blank, which decoding by itself would drop
            return name.replace(_BLANK, " ").encode()
        text = self.decode([token_id], skip_special=False)
        letters = byte_letters()
        if UNFINISHED in text and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name)
        return text.encode()


class WordTokenizer(HuggingFaceTokenizer):
    """A tokenizer that knows single words between blanks and no others, as that of the built-in model."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """See Tokenizer; an unknown word is a UsageError."""
        vocabulary = self.inner.get_vocab()
        strange = next((word for word in text.split() if word not in vocabulary), None)
        if strange is not None:
            raise UsageError(
                f"{strange!r} is no word of this model, which speaks a language of its own, such as"
                " 'KEY k3 v8 QUERY k3' (see docs/builtin-model.md): use its words, or give token ids"
            )
        return super().encode(text, add_special=add_special)


class Detokenizer:
    """Turns a growing list of tokens into text piece by piece; the pieces never end in half a character.

    Each step decodes a short window of the last tokens, with what was emitted of it cut off: a token's text
    may depend on the one before it (spaces), so the window starts one piece early. Of an undecodable end only
    the last U+FFFD can still become a character, so only that is held back.
    """

    MAX_WINDOW = 64  # tokens; beyond it an end that never becomes a character is let go

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._num_context = 0  # tokens of the window whose text was emitted before
        self._num_emitted = 0  # characters emitted of the text after the context

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` make certain."""
        self._window.extend(token_ids)
        text = self._pending()
        piece = text[self._num_emitted : -1 if text.endswith(UNFINISHED) else None]
        # A window that gave no text stays: as context, a special token would hide the word before it.
        whole = self._num_emitted + len(piece) == len(text) > 0
        if whole or len(self._window) > self.MAX_WINDOW:
            piece = text[self._num_emitted :]
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_emitted = 0
        else:
            self._num_emitted += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._pending()[self._num_emitted :]
        self._num_emitted += len(piece)
        return piece

    def _pending(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special=self._skip_special)
        context = self._tokenizer.decode(self._window[: self._num_context], skip_special=self._skip_special)
        return text[len(context) :]


class StopStrings:
    """Looks for stop strings in text that arrives in pieces, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that is certain to come before any stop string. Nothing more once one was found."""
        if not self._stops or self.found is not None:
            return piece if self.found is None else ""
        text = self._held + piece
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            # The first to be complete (of several, the longest): so the pieces make no difference.
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class OutputText:
    """The text of one output: detokenized, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text that is certain so far."""
        return "".join(self._pieces)

    @property
    def stop(self) -> str | None:
        """The stop string that was found, if one was: the output ends before it."""
        return self._stops.found

    def add(self, token_ids: Iterable[int], *, given: bool = False) -> str:
        """Takes new tokens and returns the text they make certain. No stop string is looked for in `given` ones."""
        text = self._detokenizer.add(token_ids)
        return self._keep(text if given else self._stops.add(text))

    def finish(self) -> str:
        """Call once after the last token: returns what was held back. May still find a stop string."""
        piece = self._stops.add(self._detokenizer.finish())
        return self._keep(piece if self._stops.found else piece + self._stops.finish())

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
