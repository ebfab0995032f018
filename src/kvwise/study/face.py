"""What the study needs of an engine and of the place that makes them: tests give it a fake one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvwise.core.clock import Clock
from kvwise.core.output import EngineStats, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.models.text import Tokenizer
from kvwise.tasks.language import Language

# (index of the sample, index of the output token, raw logits [V] behind it)
Observe = Callable[[int, int, Any], None]


class EngineFace(Protocol):
    """The part of `kvwise.engine.engine.Engine` that the study drives."""

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
    """What the study must know of a model. `kv_token_bytes`: KV of one token, all layers and heads.

    `language` is what tasks are written in; None: it cannot be asked anything, its weights are random. `tokenizer` is
    that of a model that reads text.
    """

    name: str
    vocab_size: int
    max_model_len: int
    kv_token_bytes: int
    weight_bytes: int
    num_parameters: int
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

    def idle_methods(self, text: str, did: Mapping[str, int], tokens_reused: int) -> tuple[str, ...]:
        """The methods that strategy `text` names and that, by these attested counts, did nothing."""
        ...

    def facts(self, model: str) -> ModelFacts:
        """Load a model (once) and say what it is."""
        ...

    def engine(self, model: str, strategy: str, memory_bytes: int | None) -> EngineFace:
        """A fresh engine; `memory_bytes` is the size of its KV pool, None for its default."""
        ...

    def generate(self, model: str, side: str, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        """Generate greedily with the KV cache off ("hf-off") or on ("hf-on", "kvwise"), timed."""
        ...
