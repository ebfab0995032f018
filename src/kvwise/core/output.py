"""What comes back: outputs of a request, its times, what the methods did to it, and the engine's figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a request's stored prefix. Seconds are from admission until the prefix was there.

    `decision` is compute, load or both. `compute_s` and `load_s` are what the two fixed choices, computing or loading
    all of it, should have taken, with the speeds known when this was written down; `regret_s` is the actual time minus
    the better of the two (negative: won). None: nobody knows.
    """

    decision: str
    tokens_loaded: int
    tokens_computed: int
    compute_s: float | None = None
    load_s: float | None = None
    actual_s: float | None = None
    regret_s: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds on the engine's clock, and its token counts."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found on the device or brought back from below
    num_keyed_tokens: int = 0  # of the prompt, in full blocks that others may find: those not found are written
    num_preemptions: int = 0
    miss: str | None = None
    load: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class HeadReport:
    """What one layer and head held of a request when it ended, told where `SamplingParams.explain` asks for it.

    `kept` are the positions on the device, in order, and `recalled` those elsewhere that the last step brought back.
    The first `num_packed` of the tokens kept, in the order of their pages, lie in packed pages.
    """

    kept: list[int]
    num_packed: int = 0
    recalled: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Attestation:
    """What the methods did to one request. `did` counts, per method, the work that only it does."""

    strategy: str
    tokens_seen: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    tokens_loaded: int = 0  # of the prompt, brought back from a tier below the device
    tokens_dropped: int = 0  # per layer and head: a token dropped by all L*H heads counts L*H
    tokens_merged: int = 0  # likewise: dropped, but living on in others
    tokens_demoted: int = 0  # likewise: not dropped but moved to the host, from where a selection brings them back
    tokens_fetched: int = 0  # likewise
    tokens_recalled_cached: int = 0  # of those fetched: still on the device from a step before, so no bytes moved
    fetch_candidates: int = 0  # tokens a selection could have fetched: fetched / candidates is the share read
    recall_hits: int = 0  # of the tokens the true query scores highest, how many were fetched (engine config: audit)
    recall_total: int = 0
    bits_per_element: float = 0.0  # of K and V, on average of the tokens held when the request had settled
    bytes_freed: int = 0
    bytes_fetched: int = 0
    did: dict[str, int] = field(default_factory=dict)
    heads: list[list[HeadReport]] | None = None  # by layer (of those that store KV) and head, if asked for


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one sampled token and of the most likely ones (raw distribution)."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One output sequence of a request. A step emits it when tokens were added; `new_token_ids` says which.

    With `n > 1` each of the n samples is an output of its own, told apart by `index`.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    new_token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    error: str | None
    logprobs: list[TokenLogprob] | None
    metrics: RequestMetrics
    attestation: Attestation

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of one moment. Bytes are bytes in use per tier; blocks are of the device pool."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_steps: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    pool_bytes: int
    kv_bytes: Mapping[str, int]
    prefix_queries: int  # tokens looked up
    prefix_hits: int  # tokens found
    links: Mapping[str, str]  # throttled links and their label, such as {"host:device": "12 GB/s (throttled)"}
    tiers: Mapping[str, object] = field(default_factory=dict)  # figures of the tiers below, by name
