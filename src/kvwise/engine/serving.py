"""What a service is asked and what it says: requests, limits, states, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from kvwise.cache.ages import AgeFigures
from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.errors import KvwiseError
from kvwise.core.output import EngineStats
from kvwise.core.params import SamplingParams


class State(StrEnum):
    """How the service is. Only READY takes requests."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    SWITCHING = "switching"  # the strategy: running requests end first
    DRAINING = "draining"  # running requests end, then it is CLOSED
    STUCK = "stuck"  # there is work, and no step has ended for longer than the watchdog allows
    BROKEN = "broken"  # a promise of the cache does not hold
    CLOSED = "closed"


class Overloaded(KvwiseError):
    """There is no room in the queue: try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(KvwiseError):
    """The service takes no requests in its `state`; try again in `retry_after_s` seconds."""

    def __init__(self, state: State, retry_after_s: float) -> None:
        super().__init__(f"the server is {state}: try again in {retry_after_s:.0f} s")
        self.state = state
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What may wait: requests that no step has scheduled yet, and the tokens of their prompts."""

    max_waiting: int = 256
    max_waiting_tokens: int = 2_000_000
    slow_reader_s: float = 30.0  # a stream whose oldest news nobody has taken for so long is aborted
    watchdog_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to an engine; fields as of `Engine.add_request`. `strategy` None: the service's own."""

    prompt: Sequence[int]
    params: SamplingParams | Sequence[SamplingParams]
    request_id: str
    images: Sequence[Any] = ()
    tenant: str = ""
    session: str = ""
    scope: Scope = Scope.TENANT
    ttl: Ttl = NO_TTL
    cache_salt: str = ""
    num_shareable: int | None = None
    priority: int = 0
    strategy: str | None = None

    @property
    def num_samples(self) -> int:
        """Outputs to come."""
        return self.params.n if isinstance(self.params, SamplingParams) else len(self.params)


class Moved(NamedTuple):
    """Bytes that were read from a tier and written to it."""

    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Figures of one engine, at most a tenth of a second old. Counters since its start."""

    strategy: str
    at: float  # seconds on the service's clock
    stats: EngineStats
    misses: Mapping[str, int]  # admitted requests by what stopped their run of hits
    num_evicted: int
    num_leaked: int  # blocks that are held though no request runs and no transfer is on its way
    ages: AgeFigures = field(default_factory=AgeFigures)
    moved: Mapping[str, Moved] = field(default_factory=dict)  # by tier below the device
