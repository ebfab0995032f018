"""Settings of a server, beside those of its engine; names are vLLM's where the thing is the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server listens, what it lets in, and what it tells. Times in seconds, sizes in bytes."""

    model_names: Sequence[str]  # under which requests name the model; the first is what answers say
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 16 * 2**20
    max_json_depth: int = 64
    max_json_items: int = 1_000_000  # numbers, strings, keys and containers of a body together
    max_header_bytes: int = 32 * 2**10
    request_timeout_s: float = 30.0  # until a request, head and body, has arrived
    keep_alive_s: float = 15.0  # between requests of one connection
    sse_keep_alive_s: float = 15.0  # a stream that is silent for so long gets a comment
    slow_reader_s: float = 30.0  # a client that takes nothing for so long is cut off
    drain_s: float = 30.0  # after SIGTERM, until what runs is aborted
    max_connections: int = 4096
    max_n: int = 64  # samples of a request
    max_prompts: int = 256  # prompts of one completions request
    allow_special_tokens: bool = False  # texts of requests may spell the model's special tokens
    keys_file: Path | None = None  # tenants and their API keys; None: everybody is one tenant without a name
    admin_key_file: Path | None = None  # its content opens the administration; None: there is none
    insecure: bool = False  # listen on all interfaces without keys
    log_prompts: bool = False
    vllm_metrics: bool = False
    open_metrics: bool = False  # /metrics needs no key although there are tenants, who could read each other's totals
    otlp_endpoint: str | None = None
    warm_file: Path | None = None  # prompts to be computed before the server is ready
    live: bool = True  # the live view at /

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, bool, str], ...] = (
            ("model_names", bool(self.model_names) and all(self.model_names), "at least one name, none empty"),
            ("port", 0 <= self.port <= 65535, "0 (any free one) to 65535"),
            ("max_body_bytes", self.max_body_bytes >= 1024, "at least 1024"),
            ("max_json_depth", self.max_json_depth >= 8, "at least 8"),
            ("max_json_items", self.max_json_items >= 64, "at least 64"),
            ("max_header_bytes", self.max_header_bytes >= 1024, "at least 1024"),
            *((name, getattr(self, name) > 0, "above 0") for name in _ABOVE_0),
        )
        for name, ok, limit in limits:
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range: it must be {limit}")


_ABOVE_0 = (
    "request_timeout_s", "keep_alive_s", "sse_keep_alive_s", "slow_reader_s", "drain_s", "max_connections", "max_n",
    "max_prompts",
)  # fmt: skip
