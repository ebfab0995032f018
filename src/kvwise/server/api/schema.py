"""Requests as clients send them. Each field acts, or is refused: nothing is accepted and ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from kvwise.server.api.fields import STRICT, LogitBias, Name, Prompt, TokenId, neutral, or_text
from kvwise.server.errors import ApiError

NO_TOOLS = "tools are not implemented"
NO_AUDIO = "audio is not implemented"
NO_STORE = "nothing is stored of requests"


class Options(BaseModel):
    """A part of a request."""

    model_config = STRICT


class StreamOptions(Options):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: neutral("obfuscation of streams is not implemented", False) = None  # type: ignore[valid-type]


class CacheOptions(Options):
    """What becomes of the prompt's KV: see `caching`."""

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}[smhd]$")] | None = None


class Breakpoint(Options):
    """The end of a reusable prefix."""

    mode: Literal["explicit"]


class GenerationRequest(Options):
    """What chats and completions have in common. Ranges are OpenAI's, names of what it lacks vLLM's."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4), *or_text(str)
    ] | None = None  # fmt: skip
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # nearer to 0 logits would overflow
    logit_bias: LogitBias | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # a smaller one goes first
    session_id: Name | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    prompt_cache_key: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    strategy: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    attest: bool | None = None  # the answer tells what was done to the request's KV

    @model_validator(mode="after")
    def _options_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for streams: send stream: true with it", param="stream_options")
        return self


class ImageUrl(Options):
    """An image within the request."""

    url: Annotated[str, Field(min_length=1)]
    detail: neutral("images are seen in one level of detail", "auto") = None  # type: ignore[valid-type]


class TextPart(Options):
    """Text of a message. Parts of text follow each other without anything between them."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Breakpoint | None = None


class ImagePart(Options):
    """An image of a message, as a `data:` URL of base64."""

    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Breakpoint | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class Message(Options):
    """One turn. An answer's message can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1, fail_fast=True), *or_text(_text_part)]
    name: neutral("names of participants are not implemented") = None  # type: ignore[valid-type]
    refusal: neutral("refusals are not implemented") = None  # type: ignore[valid-type]
    annotations: neutral("annotations are not implemented", []) = None  # type: ignore[valid-type]
    audio: neutral(NO_AUDIO) = None  # type: ignore[valid-type]
    tool_calls: neutral(NO_TOOLS, []) = None  # type: ignore[valid-type]
    function_call: neutral(NO_TOOLS) = None  # type: ignore[valid-type]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: neutral(NO_TOOLS, []) = None  # type: ignore[valid-type]
    tool_choice: neutral(NO_TOOLS, "none") = None  # type: ignore[valid-type]
    parallel_tool_calls: neutral(NO_TOOLS) = None  # type: ignore[valid-type]
    functions: neutral(NO_TOOLS, []) = None  # type: ignore[valid-type]
    function_call: neutral(NO_TOOLS, "none") = None  # type: ignore[valid-type]
    response_format: neutral("only plain text is implemented", {"type": "text"}) = None  # type: ignore[valid-type]
    modalities: neutral("only text is implemented", ["text"]) = None  # type: ignore[valid-type]
    audio: neutral(NO_AUDIO) = None  # type: ignore[valid-type]
    prediction: neutral("predicted outputs are not implemented") = None  # type: ignore[valid-type]
    reasoning_effort: neutral("reasoning is not implemented", "none") = None  # type: ignore[valid-type]
    verbosity: neutral("verbosity is not implemented", "medium") = None  # type: ignore[valid-type]
    web_search_options: neutral("searching the web is not implemented") = None  # type: ignore[valid-type]
    moderation: neutral("moderation is not implemented") = None  # type: ignore[valid-type]
    service_tier: neutral("there is one tier of service", "auto", "default") = None  # type: ignore[valid-type]
    store: neutral(NO_STORE, False) = None  # type: ignore[valid-type]
    metadata: neutral(NO_STORE, {}) = None  # type: ignore[valid-type]
    safety_identifier: neutral("say it with user") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens say the same and differ: send one of them",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        marked = [part for one in self.messages for part in one.content if part.prompt_cache_breakpoint is not None]
        if len(marked) > 4:
            raise ApiError(400, "at most 4 parts may have a prompt_cache_breakpoint", param="messages")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: neutral("answers do not repeat the prompt", False) = None  # type: ignore[valid-type]
    suffix: neutral("inserting before a suffix is not implemented", "") = None  # type: ignore[valid-type]
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _all_are_best(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of other than n is not implemented: leave it out", param="best_of")
        return self


class TokenizeRequest(Options):
    """`POST /tokenize`: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None  # null: true for a text; a template writes its own
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise ApiError(
                400, "a chat template writes special tokens itself: leave it out", param="add_special_tokens"
            )
        return self


class DetokenizeRequest(Options):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]  # the first fault will do, and a million take seconds
