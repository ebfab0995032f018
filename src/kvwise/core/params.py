"""What a request asks of the sampler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Names and meanings as in vLLM; temperature 0 is greedy."""

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many top alternatives to report beside the chosen token
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Teacher forcing: the output begins with these tokens, whatever the logits say; none of them ends the request.
    forced_tokens: Sequence[int] | None = None
    explain: bool = False  # the attestation tells what each layer and head held when the request ended

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, bool, str], ...] = (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 0, "0 (the prompt is computed, nothing is generated) or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens={self.max_tokens}"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("forced_tokens", self.num_forced <= self.max_tokens, f"at most max_tokens={self.max_tokens} ids"),
        )
        for name, ok, limit in limits:
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range: it must be {limit}")

    @property
    def num_forced(self) -> int:
        """How many tokens of the output are given."""
        return 0 if self.forced_tokens is None else len(self.forced_tokens)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0
