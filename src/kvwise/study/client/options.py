"""What a run of `kvwise bench` is asked: where to send, what, when, and which figures to tell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvwise.core.errors import UsageError

MAX_PROMPTS = 1_000_000
SERVICE_LEVELS = ("ttft", "tpot", "e2el")
METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time")


class EndpointType(StrEnum):
    """Which of OpenAI's two ways to generate."""

    COMPLETIONS = "openai"
    CHAT = "openai-chat"


class Dataset(StrEnum):
    """Where prompts come from."""

    RANDOM = "random"
    SHAREGPT = "sharegpt"
    MOONCAKE = "mooncake"
    MULTI_TURN = "multi-turn"
    CUSTOM = "custom"


_PATHS = {EndpointType.COMPLETIONS: "/v1/completions", EndpointType.CHAT: "/v1/chat/completions"}
_NEED_FILE = (Dataset.SHAREGPT, Dataset.MOONCAKE, Dataset.CUSTOM)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what all of them say. Times in seconds."""

    base_url: str
    endpoint_type: EndpointType = EndpointType.COMPLETIONS
    endpoint: str | None = None  # None: the endpoint type's own
    model: str | None = None  # None: the first that the server names
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    session: bool = False  # conversations send X-Session-ID
    timeout_s: float = 600.0  # of one request
    ready_timeout_s: float = 0.0  # for how long a server that does not answer is asked again

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"base URL {self.base_url!r} must be like http://127.0.0.1:8000")
        _within("timeout", self.timeout_s, self.timeout_s > 0, "above 0")
        _within("ready timeout", self.ready_timeout_s, self.ready_timeout_s >= 0, "0 or more")

    @property
    def is_chat(self) -> bool:
        """Whether prompts are messages."""
        return self.endpoint_type is EndpointType.CHAT

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return self.at(self.endpoint or _PATHS[self.endpoint_type])

    def at(self, path: str) -> str:
        """The URL of a path of the server; a base URL that ends in /v1, as OpenAI's clients take it, is fine."""
        base, path = self.base_url.rstrip("/"), "/" + path.lstrip("/")
        return base.removesuffix("/v1") + path if path.startswith("/v1/") else base + path


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked, and when. Lengths in tokens, times in seconds, the rate in requests per second."""

    dataset: Dataset = Dataset.RANDOM
    path: Path | None = None
    input_len: int = 1024
    output_len: int | None = None  # None: what the data set says, or else 128
    range_ratio: float = 0.0  # lengths are drawn from (1 - ratio) to (1 + ratio) times theirs
    prefix_len: int = 0  # tokens that all random prompts begin with
    num_prompts: int | None = None  # None: as many as fit `duration_s` at `rate`, or 1000
    rate: float | None = None  # None: a trace's own times, others at once
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    num_warmups: int = 0
    time_scale: float = 1.0  # times a trace's times
    length_scale: float = 1.0  # times a trace's lengths
    block_tokens: int = 512  # a trace's tokens per hash id
    num_turns: int = 3
    think_s: float = 0.0  # between an answer and the next turn
    tokenizer: str | None = None
    duration_s: float | None = None  # after that nothing more is sent

    def __post_init__(self) -> None:
        for name, ok, limit in (
            ("input_len", self.input_len >= 1, "at least 1"),
            ("output_len", self.output_len is None or self.output_len >= 1, "at least 1"),
            ("range_ratio", 0 <= self.range_ratio < 1, "0 or more and below 1"),
            ("prefix_len", self.prefix_len >= 0, "0 or more"),
            ("num_prompts", self.num_prompts is None or 1 <= self.num_prompts <= MAX_PROMPTS, f"1 to {MAX_PROMPTS}"),
            ("rate", self.rate is None or self.rate > 0, "above 0, or inf"),
            ("burstiness", 0 < self.burstiness < math.inf, "above 0"),
            ("max_concurrency", self.max_concurrency is None or self.max_concurrency >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("num_warmups", 0 <= self.num_warmups <= MAX_PROMPTS, f"0 to {MAX_PROMPTS}"),
            ("time_scale", 0 <= self.time_scale < math.inf, "0 or more"),
            ("length_scale", 0 < self.length_scale < math.inf, "above 0"),
            ("block_tokens", self.block_tokens >= 1, "at least 1"),
            ("num_turns", self.num_turns >= 1, "at least 1"),
            ("think_s", 0 <= self.think_s < math.inf, "0 or more"),
            ("duration_s", self.duration_s is None or 0 < self.duration_s < math.inf, "above 0"),
        ):
            _within(name, getattr(self, name), ok, limit)
        if self.dataset in _NEED_FILE and self.path is None:
            raise UsageError(f"data set {self.dataset} is a file: give its path with --dataset-path")
        if self.dataset is Dataset.RANDOM and self.path is not None:
            raise UsageError(f"random prompts come from no file: name the kind of {self.path} with --dataset-name")

    @property
    def count(self) -> int:
        """Requests to send at most."""
        if self.num_prompts is not None:
            return self.num_prompts
        if self.duration_s is None or self.rate is None or math.isinf(self.rate):
            return 1000
        return min(MAX_PROMPTS, max(1, math.ceil(self.rate * self.duration_s)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which figures are told, and what a good request is (limits in milliseconds)."""

    goodput: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS[:4]
    percentiles: tuple[float, ...] = (99.0,)
    trust_prompts: bool = False  # input tokens are counted as the data set says, not as the server's usage does

    def __post_init__(self) -> None:
        for name, limit in self.goodput.items():
            if name not in SERVICE_LEVELS:
                raise UsageError(f"goodput {name!r} is no service level: choose from {', '.join(SERVICE_LEVELS)}")
            _within(f"goodput {name}", limit, 0 <= limit < math.inf, "milliseconds, 0 or more")
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"percentile metric {name!r} is unknown: choose from {', '.join(METRICS)}")
        for value in self.percentiles:
            _within("metric percentile", value, 0 <= value <= 100, "0 to 100")


def _within(name: str, value: object, ok: bool, limit: str) -> None:
    if not ok:
        raise UsageError(f"{name}={value!r} is out of range: it must be {limit}")
