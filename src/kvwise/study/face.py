"""What the study needs of an engine and of the place that makes them: tests give it a fake one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvwise.core.clock import Clock
from kvwise.core.output import EngineStats, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.models.text import Tokenizer
from kvwise.study.placement import NOWHERE, Placement
from kvwise.tasks.language import Language

# (index of the sample, index of the output token, raw logits [V] behind it)
Observe = Callable[[int, int, Any], None]


class EngineFace(Protocol):
    """The part of `kvwise.engine.engine.Engine` that the study drives, and two sizes of its KV."""

    @property
    def block_bytes(self) -> int:
        """Of a whole block's keys and values."""
        ...

    @property
    def num_heads(self) -> int:
        """Places in which a token can be kept or dropped: layers that store KV, times KV heads."""
        ...

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_id: str | None = None,
        arrival: float | None = None,
        observe: Observe | None = None,
    ) -> str:
        """Queue a request; several `params` are samples forked from the prompt's cache."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request."""
        ...

    def step(self) -> list[RequestOutput]:
        """Schedule, run, commit."""
        ...

    def has_unfinished(self) -> bool:
        """Whether `step` has work or news."""
        ...

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the study must know of a model. `kv_token_bytes`: KV of one token, all layers and heads, `num_heads`.

    `language` is what tasks are written in; None: it cannot be asked anything, its weights are random. `tokenizer` is
    that of a model that reads text.
    """

    name: str
    vocab_size: int
    max_model_len: int
    kv_token_bytes: int
    weight_bytes: int
    num_parameters: int
    num_heads: int
    language: Language | None = None
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class OnOffRun:
    """One timed generation: which side, how many tokens, seconds to the first and to all, and the tokens."""

    side: str  # "hf-off" | "hf-on" | "kvwise"
    output_tokens: int
    first_s: float
    total_s: float
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoaderSetup:
    """An engine with one loading method over one tier, for one long request and `others` short ones at a time.

    A request may compute `share` of `step_tokens` tokens in a step, which is then drawn out to what a full step takes:
    `full_step_s` are its fixed seconds and its seconds per token of context (None: nothing is drawn out).
    """

    model: str
    strategy: str
    tier: str
    longest: int
    step_tokens: int
    share: float = 1.0
    full_step_s: tuple[float, float] | None = None
    others: int = 0
    others_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step: tokens computed, their mean context, seconds."""

    num_tokens: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoaderRun:
    """Requests that arrived at `start` together, in the order they were given, and the steps they took."""

    start: float
    outputs: tuple[RequestOutput, ...]
    steps: tuple[StepTime, ...]


class LoaderFace(Protocol):
    """A `LoaderSetup` at work."""

    lossless: bool  # whether loaded KV is to the bit what was computed
    chunk_tokens: int  # tokens that are loaded at a time; 0: the method has no chunks of tokens

    def store(self, prompt: Sequence[int]) -> None:
        """Compute a prompt, undisturbed and as fast as it goes, and wait until it lies in the tier."""
        ...

    def throttle(self, bytes_per_second: float) -> None:
        """Set the speed of the link up from the tier."""
        ...

    def run(self, prompts: Sequence[Sequence[int]]) -> LoaderRun:
        """Serve prompts that arrive together, one token each, from a device that holds nothing, and forget them."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Bench(Protocol):
    """Where engines come from, and the time they live in."""

    clock: Clock

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...

    def resident_bytes(self) -> int:
        """Memory of this process that is in RAM."""
        ...

    def check_strategy(self, text: str) -> None:
        """StrategyError if `text` is no strategy."""
        ...

    def check_placement(self, text: str, placement: Placement) -> None:
        """PlanError if strategy `text` cannot be run there: a method that loads without tiers, a link that is none."""
        ...

    def idle_methods(
        self, text: str, did: Mapping[str, int], tokens_reused: int, num_loads: int = 0, heads_shared: int = 0
    ) -> tuple[str, ...]:
        """The methods that strategy `text` names and that, by these attested counts, did nothing.

        A loading method that decided about `num_loads` requests did its work, also if it decided to compute; an
        encoding did by which `heads_shared` heads store nothing, since their layers read another's KV.
        """
        ...

    def facts(self, model: str) -> ModelFacts:
        """Load a model (once) and say what it is."""
        ...

    def engine(self, model: str, strategy: str, memory_bytes: int | None, placement: Placement = NOWHERE) -> EngineFace:
        """A fresh engine; `memory_bytes` is the size of its KV pool, None for its default."""
        ...

    def loader(self, setup: LoaderSetup) -> LoaderFace:
        """A fresh engine that loads."""
        ...

    def generate(self, model: str, side: str, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        """Generate greedily with the KV cache off ("hf-off") or on ("hf-on", "kvwise"), timed."""
        ...
