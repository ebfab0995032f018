"""What the server knows of one request: for metrics, the log, traces and the live view."""

from dataclasses import dataclass, field
from typing import Protocol

from kvwise.core.output import Attestation, RequestMetrics


@dataclass(slots=True)
class RequestRecord:
    """One generation, from its arrival to its end. Times are seconds on the service's clock."""

    request_id: str
    route: str  # the route's template, such as /v1/chat/completions
    tenant: str  # the tenant's name, never a key or a salt
    model: str
    strategy: str
    streams: bool
    arrival: float
    answer_id: str = ""  # the id in its answer, with which the engine's ids begin; "": it was never queued
    user: str = ""  # as the client says
    session: str = ""
    traceparent: str = ""  # as the client sent it (W3C Trace Context)
    prompt: str = ""  # its text; only where the settings let it into the log
    num_prompt: int = 0  # tokens, all prompts of the request
    num_cached: int = 0  # of these, found in the cache, as the answer's usage says
    num_output: int = 0  # tokens, all samples so far
    status: int = 0  # HTTP; 0: not decided yet
    error: str | None = None  # its code or type, never a text of the request
    finish_reasons: list[str] = field(default_factory=list)
    first_token: float | None = None
    finished: float | None = None
    disconnected: bool = False
    metrics: list[RequestMetrics] = field(default_factory=list)  # of the samples that have ended
    attestations: list[Attestation] = field(default_factory=list)  # likewise


class RequestObserver(Protocol):
    """Somebody who is told of requests, on the event loop. Must be quick, and must not raise."""

    def accepted(self, record: RequestRecord) -> None:
        """A request was queued."""
        ...

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """So many tokens were handed to the client at `now`."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """A request has ended, or was refused before it was queued: `status`, `error` and `finished` are set."""
        ...
