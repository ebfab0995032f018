"""What answers look like, for the OpenAPI document: they are written without pydantic, token by token."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Part):
    """What the cache had of a prompt."""

    cached_tokens: int
    cache_write_tokens: int


class Usage(_Part):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Attested(_Part):
    """What the methods did to a sample's KV; only with `attest: true`."""

    strategy: str
    layers_and_heads: int
    tokens_seen: int
    tokens_computed: int
    tokens_reused: int
    tokens_loaded: int
    tokens_kept: int
    tokens_dropped: int
    tokens_merged: int
    tokens_demoted: int
    tokens_recalled: int
    bits_per_element: float
    bytes_freed: int
    methods: dict[str, int]


class TopLogprob(_Part):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Part):
    """Log-probabilities of a chat."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(_Part):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: list[Any]


class ChatChoice(_Part):
    """One sample of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    kvwise: Attested | None = None


class ChatAnswer(_Part):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(_Part):
    """Log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Part):
    """One sample of one prompt: `index` is the prompt's times n, plus the sample's."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    kvwise: Attested | None = None


class CompletionAnswer(_Part):
    """The answer to a completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(_Part):
    """One name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Part):
    """All names of the model."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Part):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Part):
    """The text of token ids."""

    prompt: str
