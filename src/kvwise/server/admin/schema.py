"""What the administration is asked and answers, as strict models."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from kvwise.core.output import EngineStats
from kvwise.server.errors import ApiError

_MOST_PROMPTS = 256
_MOST_SECONDS = 10 * 365 * 86400.0
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
PromptValue = Annotated[Text | Ids, Field(description="A text, or token ids.")]
Seconds = Annotated[float, Field(gt=0, le=_MOST_SECONDS)]
TenantName = Annotated[str, Field(max_length=64, description='As in the keys file; "" where there is none.')]
SessionName = Annotated[str, Field(min_length=1, max_length=256)]
StrategyName = Annotated[str, Field(min_length=1, max_length=512)]
Only = Annotated[StrategyName | None, Field(description="Only this strategy's engine; left out: every engine.")]


# A literal true would take 1 too, and forget everything for it.
Everything = Annotated[bool | None, WithJsonSchema({"enum": [True, None]})]


def _refused(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


class Asked(BaseModel):
    """The base of bodies: nothing is converted, nothing unknown is taken."""

    model_config = _STRICT


class Whose(Asked):
    """Whose KV it is: the same fields under which a request would find it."""

    tenant: TenantName = ""
    session: SessionName | None = None
    scope: Literal["tenant", "session", "global"] = "tenant"
    cache_salt: Annotated[str, Field(max_length=128)] = ""
    strategy: Only = None

    @model_validator(mode="after")
    def _session_if_needed(self) -> Self:
        if self.scope == "session" and self.session is None:
            raise _refused("scope 'session' needs a session: name one", "session")
        return self


class PromptQuery(Whose):
    """One prompt."""

    prompt: PromptValue


class HowLong(Asked):
    """Until when a pin holds; without either until it is ended."""

    until: Annotated[float | None, Field(description="Unix seconds.")] = None
    for_s: Seconds | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.until is not None and self.for_s is not None:
            raise _refused("until and for_s both say when the pin ends: give one of them", "until")
        return self


class PinRequest(PromptQuery, HowLong):
    """A prompt whose KV nobody may evict."""


class WarmRequest(Whose, HowLong):
    """Prompts to be computed and kept."""

    prompts: Annotated[list[PromptValue], Field(min_length=1, max_length=_MOST_PROMPTS)]
    pin: bool = False
    ttl_s: Seconds | None = None
    idle_ttl_s: Seconds | None = None

    @model_validator(mode="after")
    def _end_of_a_pin(self) -> Self:
        if (self.until is not None or self.for_s is not None) and not self.pin:
            raise _refused("until and for_s say when a pin ends: add pin", "pin")
        return self


class PurgeRequest(Asked):
    """What to forget: everything, or a tenant's all, or of a tenant one session or one prompt."""

    everything: Everything = None
    tenant: TenantName | None = None
    session: SessionName | None = None
    prompt: PromptValue | None = None
    scope: Literal["tenant", "global"] = "tenant"
    cache_salt: Annotated[str, Field(max_length=128)] = ""

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if self.everything is False:
            raise _refused("everything can only be true: leave it out", "everything")
        rest = (self.tenant, self.session, self.prompt)
        if self.everything is not None and any(one is not None for one in rest):
            raise _refused("everything stands alone: leave out tenant, session and prompt", "everything")
        if self.session is not None and self.prompt is not None:
            raise _refused("a session or a prompt: give one of them", "session")
        if self.everything is None and all(one is None for one in rest):
            raise _refused("say what: everything, tenant, session or prompt")
        if self.prompt is None and (self.cache_salt or self.scope != "tenant"):
            raise _refused("scope and cache_salt belong to a prompt: name one", "prompt")
        return self


class SessionRequest(Asked):
    """A session to be opened, and the times to live of what its requests store."""

    tenant: TenantName = ""
    ttl_s: Seconds | None = None
    idle_ttl_s: Seconds | None = None


class SessionQuery(BaseModel):
    """Which session ends, and how."""

    model_config = ConfigDict(extra="forbid")

    tenant: TenantName = ""
    purge: Annotated[bool, Field(description="Forget in every tier what only it holds.")] = False


class StrategyRequest(Asked):
    """The strategy to be the default, and how long running requests may take to end."""

    strategy: StrategyName
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0


class DrainRequest(Asked):
    """How long running requests may take to end."""

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0


# -- answers --------------------------------------------------------------------------------------------------------


class Where(BaseModel):
    """Where the full blocks of a prompt are: the leading run on the device, then those found below, by tier."""

    strategy: str
    tokens: int
    blocks: int
    on_device: int
    below: dict[str, int]
    resident: bool


class ResidenceAnswer(BaseModel):
    """Where a prompt's KV is, by engine."""

    engines: list[Where]


class WarmedPrompt(Where):
    """What became of one prompt, in tokens."""

    prompt: Annotated[int, Field(description="Its place in the request, from 0.")]
    computed: int
    loaded: int
    error: str | None = None


class WarmAnswer(BaseModel):
    """`resident`: all full blocks of all prompts are somewhere, now that all have been computed."""

    resident: bool
    prompts: list[WarmedPrompt]


class Changed(BaseModel):
    """How many blocks on the device it was."""

    strategy: str
    blocks: int


class ChangedAnswer(BaseModel):
    """What was done, by engine."""

    engines: list[Changed]


class PurgedTier(BaseModel):
    """What left a tier. `found_again` is of a look-up in that tier afterwards, and 0 if the purge held."""

    tier: str
    blocks: int
    bytes: int
    overwritten: Annotated[bool, Field(description="The medium let the bytes be overwritten.")]
    found_again: int


class PurgedEngine(BaseModel):
    """What a purge did in one engine and its tiers."""

    strategy: str
    tiers: list[PurgedTier]
    shared: Annotated[int, Field(description="Blocks that stay, since another live owner holds them.")]
    in_use: Annotated[int, Field(description="Blocks that nobody finds any more, and that go when a request ends.")]


class PurgeAnswer(BaseModel):
    """`proven`: look-ups in every tier found nothing of what was purged."""

    proven: bool
    engines: list[PurgedEngine]


class SessionEntry(BaseModel):
    """A session in one engine."""

    strategy: str
    session: str
    tenant: str
    is_open: bool
    blocks: int
    running: int
    idle_s: float
    closes_in_s: Annotated[float | None, Field(description="If nobody uses it; null: never.")]


class SessionsAnswer(BaseModel):
    """Sessions that are remembered, by engine."""

    sessions: list[SessionEntry]


class SessionAnswer(BaseModel):
    """What became of a session; `purged` if that was asked for."""

    session: str
    tenant: str
    is_open: bool
    purged: PurgeAnswer | None = None


class EngineEntry(BaseModel):
    """Figures of one engine, at most a tenth of a second old; counters since its start."""

    strategy: str
    stats: EngineStats
    misses: dict[str, int]
    evicted: int
    leaked: int


class TenantEntry(BaseModel):
    """A tenant's limits, and what it uses of them now."""

    name: str
    running: Annotated[int, Field(description="Samples in flight.")]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    cached_bytes: int | None


class StatsAnswer(BaseModel):
    """The state of the service, its engines and its tenants."""

    state: str
    waiting: int
    waiting_tokens: int
    engines: list[EngineEntry]
    tenants: list[TenantEntry]


class StrategyAnswer(BaseModel):
    """The default strategy, and all that requests may choose."""

    default: str
    strategies: list[str]


class DrainAnswer(BaseModel):
    """`drained`: every request ended by itself."""

    state: str
    drained: bool
