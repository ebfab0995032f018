"""A request on its way: its tokens, where its KV is, and what it has produced."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from torch import Tensor

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.core.output import Attestation, FinishReason, RequestMetrics, TokenLogprob
from kvwise.core.params import SamplingParams
from kvwise.engine.sampler import SequenceSampler
from kvwise.models.text import OutputText
from kvwise.models.vision import Placed

Observe = Callable[[int, int, Tensor], None]  # (index of the sample, index of the output token, logits [V])


class Phase(Enum):
    """Where a sequence stands. WAITING holds no memory."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of one request.

    `tokens` is prompt plus output; the first `num_computed` have their KV in the cache. `row` is the sequence's row
    in the cache manager while it holds memory. `settled` says that a placement has rearranged its KV.
    """

    request_id: str
    index: int
    prompt: list[int]  # never changed
    tokens: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    attestation: Attestation
    output: OutputText
    sampler: SequenceSampler
    observe: Observe | None = None
    salt: str | None = ""  # None: nothing of it is shared
    priority: int = 0  # a smaller one goes first, under that policy
    phase: Phase = Phase.WAITING
    row: int | None = None
    num_computed: int = 0
    settled: bool = False
    session: str = ""
    num_owned: int = 0  # leading keys that its session is known to use
    terms: Terms = NO_LIMIT  # under which its blocks are kept, here and below
    num_offered: int = 0  # leading blocks that were considered for storing below
    declines_loading: bool = False  # what was loaded for it turned out bad: it computes
    ttft_target_s: float | None = None
    keys: PrefixKeys | None = None
    images: Placed | None = None
    siblings: "list[Sequence]" = field(default_factory=list)  # samples that fork from this one after its prefill
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_emitted: int = 0  # output tokens that some RequestOutput has told
    told: bool = False  # the end has been told
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def num_outputs(self) -> int:
        """Tokens produced so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is still to be computed: 1 while decoding, more in prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def image_spans(self) -> tuple[tuple[int, int], ...]:
        """Where the tokens of its images are: (first, stop)."""
        return () if self.images is None else self.images.spans

    @property
    def rotates(self) -> bool:
        """Whether its tokens are rotated by other numbers than their positions, which its images tell."""
        return self.images is not None and self.images.positions is not None

    def token_array(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """All tokens as int64."""
        return np.asarray(self.tokens, dtype=np.int64)

    @property
    def has_news(self) -> bool:
        """Whether there is something that no output has told yet."""
        return self.num_emitted < self.num_outputs or (self.phase is Phase.FINISHED and not self.told)
