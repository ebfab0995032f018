"""Texts and messages as prompts of token ids, without holding up the event loop."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from kvwise.core.errors import UsageError
from kvwise.engine.seeing import place_images
from kvwise.models.text import Tokenizer
from kvwise.models.vision import Vision
from kvwise.server.api.deadline import within
from kvwise.server.api.images import read_images
from kvwise.server.api.schema import ImagePart, Message
from kvwise.server.context import Server
from kvwise.server.errors import ApiError

TEMPLATE_S = 10.0  # what a chat template and a tokenizer may take for one request
_AT_ONCE = 2000  # characters of a plain text that are tokenized in less time than a thread takes to begin
_GROWTH, _FLOOR = 16, 65_536  # a template may write so many times its messages, and at least so many characters
_ROLES = {"developer": "system"}  # templates know the older name


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, images included, and behind how many of them there are breakpoints of the cache."""

    tokens: list[int]
    images: Sequence[Any] = ()
    breakpoints: Sequence[int] = field(default=())


async def text_prompt(server: Server, text: str, *, param: str = "prompt", add_special: bool = True) -> Prompt:
    """A plain text as a prompt."""
    tokenizer = server.service.loaded.tokenizer
    _refuse_special(server, text, param)
    try:
        if len(text) <= _AT_ONCE:
            return Prompt(tokenizer.encode(text, add_special=add_special))
        return Prompt(await within(TEMPLATE_S, lambda: tokenizer.encode(text, add_special=add_special)))
    except UsageError as error:
        raise ApiError(400, str(error), param=param) from None
    except TimeoutError:
        raise ApiError(
            400, f"{param} takes longer than {TEMPLATE_S:g} s to tokenize: shorten it", param=param
        ) from None


async def chat_prompt(server: Server, messages: Sequence[Message], strategy: str | None = None) -> Prompt:
    """A conversation as the model's template writes it, ready for the answer; ApiError 400 where it cannot be."""
    loaded = server.service.loaded
    urls = [part.image_url.url for one in messages for part in one.content if isinstance(part, ImagePart)]
    if urls and loaded.vision is None:
        raise ApiError(400, f"{server.model_names[0]} reads text only: send no images", param="messages")
    for number, message in enumerate(messages):
        text = "".join(part.text for part in message.content if not isinstance(part, ImagePart))
        _refuse_special(server, text, f"messages[{number}].content")
    try:
        prompt = await within(TEMPLATE_S, lambda: _chat(loaded.tokenizer, loaded.vision, messages, urls))
        return await _expanded(server, prompt, strategy) if urls else prompt
    except UsageError as error:
        raise ApiError(400, str(error), param="messages") from None
    except TimeoutError:
        raise ApiError(
            400, f"the model's chat template takes longer than {TEMPLATE_S:g} s for these messages", param="messages"
        ) from None


def _refuse_special(server: Server, text: str, param: str) -> None:
    """A user who spells the end of a turn could speak as the system."""
    special = None if server.settings.allow_special_tokens else server.service.loaded.tokenizer.special_in(text)
    if special is not None:
        raise ApiError(
            400, f"{param} spells {special!r}, a special token of the model: rephrase it, or give token ids",
            param=param, code="special_token",
        )  # fmt: skip


def _chat(tokenizer: Tokenizer, vision: Vision | None, messages: Sequence[Message], urls: Sequence[str]) -> Prompt:
    """On a thread of its own: the template is a program of the model's author."""
    text = _render(tokenizer, vision, messages, "", len(urls))
    size = sum(len(part.text) for one in messages for part in one.content if not isinstance(part, ImagePart))
    if len(text) > (most := max(_FLOOR, _GROWTH * size)):
        raise UsageError(f"the model's chat template makes {len(text)} characters of {size}, more than {most}")
    tokens = tokenizer.encode_chat(text)
    return Prompt(tokens, read_images(urls), _breakpoints(tokenizer, vision, messages, text, tokens))


def _breakpoints(
    tokenizer: Tokenizer, vision: Vision | None, messages: Sequence[Message], text: str, tokens: list[int]
) -> list[int]:
    """Tokens in front of each breakpoint.

    Found by a template run with marks in place of the breakpoints. What it wrote before a mark counts as far as it
    wrote the same without marks; so a breakpoint may come out too early, never too late.
    """
    if not any(part.prompt_cache_breakpoint for one in messages for part in one.content):
        return []
    mark = secrets.token_hex(16)
    num_images = sum(isinstance(part, ImagePart) for one in messages for part in one.content)
    pieces = _render(tokenizer, vision, messages, mark, num_images).split(mark)
    ends = ["".join(pieces[: i + 1]) for i in range(len(pieces) - 1)]
    prefixes = [tokenizer.encode_chat(text[: _num_common(text, end)]) for end in ends]
    return [_num_common(tokens, prefix) for prefix in prefixes]


def _num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _render(
    tokenizer: Tokenizer, vision: Vision | None, messages: Sequence[Message], mark: str, num_images: int
) -> str:
    """The template's text. Of models with eyes, some templates want texts with places of images, some want parts."""
    text = tokenizer.render([_turn(one, vision, mark) for one in messages])
    if vision is not None and text.count(vision.mark) != num_images:
        text = tokenizer.render([_turn_of_parts(one, mark) for one in messages])
    return text


def _turn(message: Message, vision: Vision | None, mark: str) -> dict[str, Any]:
    pieces = []
    for part in message.content:
        assert vision is not None or not isinstance(part, ImagePart)
        pieces.append(vision.wrap if vision is not None and isinstance(part, ImagePart) else part.text)  # type: ignore[union-attr]
        pieces.append(mark if part.prompt_cache_breakpoint is not None else "")
    return {"role": _ROLES.get(message.role, message.role), "content": "".join(pieces)}


def _turn_of_parts(message: Message, mark: str) -> dict[str, Any]:
    parts: list[dict[str, str]] = []
    for part in message.content:
        parts.append({"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text})
        if part.prompt_cache_breakpoint is not None and mark:
            parts.append({"type": "text", "text": mark})
    return {"role": _ROLES.get(message.role, message.role), "content": parts}


async def _expanded(server: Server, prompt: Prompt, strategy: str | None) -> Prompt:
    """A prompt with all the tokens that its images take, which the engine's thread knows."""
    images = list(prompt.images)
    tokens, placed = await server.service.call(
        lambda engine: place_images(engine.loaded, prompt.tokens, images), strategy
    )
    assert placed is not None and server.service.loaded.vision is not None
    places = [i for i, token in enumerate(prompt.tokens) if token == server.service.loaded.vision.token]
    growth = [last - first - 1 for first, last in placed.spans]
    moved = [
        at + sum(more for place, more in zip(places, growth, strict=True) if place < at) for at in prompt.breakpoints
    ]
    return Prompt(tokens, images, moved)
