"""Choosing the next tokens of a batch of sequences.

The order of operations on a row of logits: bias, minimum length, repetition, frequency and presence
penalties, temperature, top-k, top-p, min-p (the filters in transformers' order), then one draw. Each draw
takes one uniform number that depends on nothing but the sequence's seed, its index among `n` samples and the
number of tokens it has: so a seed gives the same tokens whatever else is in the batch, and a preempted
sequence goes on as if it had not been. Log-probabilities are of the raw distribution (before all of the
above), as OpenAI reports them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.core.errors import RequestError, UsageError
from kvwise.core.output import TokenLogprob
from kvwise.core.params import SamplingParams

NUCLEUS = 1024  # candidates looked at first for top-p; more follow only where they do not suffice
COLDEST = 1e-10  # the lowest temperature that float32 can divide by; it is greedy long before


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row; `logprob` if its request asked."""

    token_id: int
    logprob: TokenLogprob | None


class SequenceSampler:
    """What the sampler keeps of one sequence: counts for the penalties, ids it must not choose yet, its seed.

    `seed` is used if the params have none. `index` tells the `n` samples of a request apart. Token ids in the
    params that the vocabulary does not have are a UsageError.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        seed: int,
        index: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self.num_outputs = 0
        self._seed = f"{seed if params.seed is None else params.seed}:{index}"
        named = (*params.stop_token_ids, *params.logit_bias)
        if (worst := next((token for token in named if not 0 <= token < vocab_size), None)) is not None:
            raise UsageError(f"token id {worst} is not in the vocabulary of {vocab_size} tokens")
        enders = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._enders = _ids(sorted(token for token in enders if token < vocab_size), device)
        self._biased = _ids(list(params.logit_bias), device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._seen: Tensor | None = None  # bool [V]: in prompt or output
        self._counts: Tensor | None = None  # float32 [V]: times in the output
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[_ids(list(prompt), device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        self.plain = params.greedy and not (
            params.logit_bias
            or params.min_tokens
            or params.logprobs is not None
            or params.forced_tokens is not None
            or self._seen is not None
            or self._counts is not None
        )

    def accept(self, token_id: int) -> None:
        """Take note of the sequence's next output token. Call once per token, in order."""
        self.num_outputs += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1

    @property
    def forced(self) -> int | None:
        """The next token, if the request dictates it."""
        tokens = self.params.forced_tokens
        return None if tokens is None or self.num_outputs >= len(tokens) else int(tokens[self.num_outputs])

    def uniform(self) -> float:
        """The number in [0, 1) that decides this sequence's next token."""
        return random.Random(f"{self._seed}:{self.num_outputs}").random()

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` would change the logits."""
        early = self.num_outputs < self.params.min_tokens
        return early or len(self._biased) > 0 or self._seen is not None or self._counts is not None

    def adjust(self, logits: Tensor) -> None:
        """Applies bias, minimum length and penalties to one row [V], in place."""
        params = self.params
        if len(self._biased):
            logits[self._biased] += self._bias
        if self.num_outputs < params.min_tokens:
            logits[self._enders] = float("-inf")
        if self._seen is not None:
            penalty = params.repetition_penalty
            scaled = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, scaled, logits))
        if self._counts is not None:
            logits -= params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)


def sample(logits: Tensor, sequences: Sequence[SequenceSampler]) -> list[Sampled | RequestError]:
    """One token per row of logits float32 [R, V]; row i belongs to sequences[i]. `logits` is not changed.

    A row from which nothing can be chosen (NaN, infinite, or everything forbidden) gives a RequestError in
    its place: the other rows are not touched by it. The caller tells each sequence what it took (`accept`).
    """
    if not sequences:
        return []
    if all(sequence.plain for sequence in sequences):
        found = zip(*_most_likely(logits), strict=True)
        return [Sampled(token, None) if good else _failure(row) for row, (token, good) in enumerate(found)]
    tokens, good = _choose(_adjusted(logits, sequences), sequences)
    logprobs = _logprobs(logits, tokens, sequences)
    return [Sampled(token, logprobs.get(row)) if good[row] else _failure(row) for row, token in enumerate(tokens)]


def _adjusted(logits: Tensor, sequences: Sequence[SequenceSampler]) -> Tensor:
    rows = [row for row, sequence in enumerate(sequences) if sequence.adjusts]
    if rows:
        logits = logits.clone()
    for row in rows:
        sequences[row].adjust(logits[row])
    return logits


def _choose(logits: Tensor, sequences: Sequence[SequenceSampler]) -> tuple[list[int], list[bool]]:
    """The token of each row (dictated, most likely or drawn), and whether the row is one to choose from."""
    tokens, good = _most_likely(logits)
    dictated = [sequence.forced for sequence in sequences]
    drawn = [row for row, one in enumerate(sequences) if not one.params.greedy and dictated[row] is None]
    if drawn:
        for row, token in zip(drawn, _draw(logits[drawn], [sequences[row] for row in drawn]), strict=True):
            tokens[row] = token
    chosen = [token if forced is None else forced for token, forced in zip(tokens, dictated, strict=True)]
    return chosen, good


def _most_likely(logits: Tensor) -> tuple[list[int], list[bool]]:
    """The most likely token of each row, and whether its logit is a finite number."""
    on_cpu = logits.device.type == "cpu"  # where numpy is ten times as fast as torch
    best = torch.from_numpy(logits.numpy().argmax(axis=1)) if on_cpu else logits.argmax(dim=1)
    tokens: list[int] = best.tolist()
    finite: list[bool] = logits.gather(1, best[:, None])[:, 0].isfinite().tolist()
    return tokens, finite


def _draw(logits: Tensor, sequences: Sequence[SequenceSampler]) -> list[int]:
    """One draw per row by inverting the cumulative distribution at the sequence's uniform number."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    params = [sequence.params for sequence in sequences]
    # Relative to the largest, a logit stays a number at any temperature.
    temperatures = column([max(one.temperature, COLDEST) for one in params])
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / temperatures
    limited = [row for row, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < logits.shape[1]]
    if limited:
        k = column([params[row].top_k or logits.shape[1] for row in limited])
        p = column([params[row].top_p for row in limited])
        scaled[limited] = _limit(scaled[limited], k, p, NUCLEUS)
    if any(one.min_p for one in params):
        scaled = scaled.masked_fill(scaled.exp() < column([one.min_p for one in params]), float("-inf"))
    reached = scaled.exp().cumsum(dim=1, dtype=torch.float64)
    total = reached[:, -1:]
    uniforms = [[one.uniform()] for one in sequences]
    target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device) * total
    # Below the total even after rounding: the first sum above the target belongs to a token with a share.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(reached, target, right=True)
    tokens: list[int] = found.clamp_max(logits.shape[1] - 1)[:, 0].tolist()
    return tokens


def _limit(scaled: Tensor, k: Tensor, p: Tensor, width: int) -> Tensor:
    """Forbids all but the k best of each row, and of those all but the fewest that hold a share p.

    k and p are [R, 1]. Looks at the `width` best (or k, if more); where p reaches beyond, at more of them.
    """
    num_tokens = scaled.shape[1]
    has_k = k < num_tokens
    width = min(num_tokens, max(width, int(k[has_k].max()) if bool(has_k.any()) else 0))
    values, ids = scaled.topk(width, dim=1)
    in_k = torch.arange(width, device=scaled.device) < k
    shares = values.exp().double() * in_k
    everything = scaled.exp().sum(dim=1, keepdim=True, dtype=torch.float64)
    total = torch.where(has_k, shares.sum(dim=1, keepdim=True), everything)
    before = shares.cumsum(dim=1) - shares
    keep = in_k & ((before < p * total) | (p >= 1))
    keep[:, 0] = True
    if width < num_tokens and bool((keep[:, -1:] & ~has_k).any()):
        return _limit(scaled, k, p, 8 * width)
    allowed = torch.full_like(scaled, float("-inf"))
    return allowed.scatter_(1, ids, values.masked_fill(~keep, float("-inf")))


def _logprobs(logits: Tensor, tokens: Sequence[int], sequences: Sequence[SequenceSampler]) -> dict[int, TokenLogprob]:
    """Raw log-probabilities of the chosen and the most likely tokens, for the rows that asked."""
    asked = {row: top for row, one in enumerate(sequences) if (top := one.params.logprobs) is not None}
    if not asked:
        return {}
    rows = list(asked)
    table = logits[rows].log_softmax(dim=1)
    chosen = table.gather(1, _ids([tokens[row] for row in rows], logits.device)[:, None])[:, 0].tolist()
    values, ids = table.topk(min(max(asked.values()), table.shape[1]), dim=1)
    tops = [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return {
        row: TokenLogprob(tokens[row], one, dict(list(top.items())[: asked[row]]))
        for row, one, top in zip(rows, chosen, tops, strict=True)
    }


def _failure(row: int) -> RequestError:
    return RequestError(f"no token can be chosen (row {row}): the logits are not finite, or every token is forbidden")


def _ids(tokens: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=device)
