"""The sampler against transformers' own processors, and what it promises about seeds and failures."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvwise.core.errors import RequestError, UsageError
from kvwise.core.params import SamplingParams
from kvwise.engine.sampler import NUCLEUS, Sampled, SequenceSampler, sample

VOCAB = 2 * NUCLEUS


def sequence(
    vocab: int = VOCAB, prompt: tuple[int, ...] = (1, 2), seed: int = 0, index: int = 0, **params: Any
) -> SequenceSampler:
    asked = SamplingParams(**{"max_tokens": 1000, **params})
    return SequenceSampler(asked, prompt, vocab_size=vocab, eos_token_ids=(0,), seed=seed, index=index)


def logits_of(rows: int, seed: int, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(found: list[Sampled | RequestError]) -> list[int]:
    assert all(isinstance(one, Sampled) for one in found)
    return [one.token_id for one in found if isinstance(one, Sampled)]


def oracle(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' distribution [V]."""
    steps = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.int64), row[None].double())[0].softmax(0)


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.5, 3.0]),
        "top_k": st.sampled_from([0, 1, 3, 50, NUCLEUS + 100, VOCAB, VOCAB + 5]),
        "top_p": st.sampled_from([1.0, 0.99999, 0.95, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "spread": st.sampled_from([0.05, 1.0, 4.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SETTINGS, min_size=1, max_size=4), st.integers(0, 10**6))
def test_draws_come_from_transformers_distribution(rows: list[dict[str, Any]], seed: int) -> None:
    logits = torch.cat([logits_of(1, seed + i, one["spread"]) for i, one in enumerate(rows)])
    asked = [sequence(seed=seed + i, **{k: v for k, v in one.items() if k != "spread"}) for i, one in enumerate(rows)]
    for row, (one, token) in enumerate(zip(asked, tokens(sample(logits, asked)), strict=True)):
        shares = oracle(logits[row], one.params)
        reached = shares.cumsum(0)
        assert shares[token] > 0, "a token that transformers forbids"
        # Inverting the same cumulative distribution at the same number gives the same token, up to rounding.
        assert reached[token] - shares[token] - 1e-6 <= one.uniform() <= reached[token] + 1e-6


def test_the_numbers_drawn_are_uniform() -> None:
    one = sequence(vocab=4, temperature=1.0)
    shares = torch.tensor([[0.5, 0.25, 0.2, 0.05]])
    counts = torch.zeros(4)
    for _ in range(4000):
        token = tokens(sample(shares.log(), [one]))[0]
        counts[token] += 1
        one.accept(token)
    torch.testing.assert_close(counts / 4000, shares[0], atol=0.025, rtol=0)


def test_greedy_rows_take_the_most_likely() -> None:
    logits = logits_of(5, 1)
    assert tokens(sample(logits, [sequence() for _ in range(5)])) == logits.argmax(1).tolist()
    mixed = [sequence(), sequence(temperature=1.0), sequence(logprobs=0), sequence(top_k=3), sequence(min_p=0.5)]
    assert tokens(sample(logits, mixed))[2:] == logits.argmax(1).tolist()[2:]
    assert sample(logits[:0], []) == []


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    def run(neighbours: int, at: int) -> list[int]:
        mine = sequence(temperature=1.2, top_p=0.9, seed=7)
        found = []
        for step in range(20):
            batch = logits_of(neighbours + 1, 100 + step)
            batch[at] = logits_of(1, step)[0]
            others = [sequence(temperature=0.5 * i, top_k=i, seed=i) for i in range(neighbours)]
            token = tokens(sample(batch, [*others[:at], mine, *others[at:]]))[at]
            mine.accept(token)
            found.append(token)
        return found

    assert run(0, 0) == run(5, 3)


def test_seeds_indices_and_params_tell_samples_apart() -> None:
    def run(**options: Any) -> list[int]:
        one, found = sequence(temperature=2.0, **options), []
        for step in range(12):
            found += tokens(sample(logits_of(1, step), [one]))
            one.accept(found[-1])
        return found

    assert run(seed=1) == run(seed=1)
    assert run(seed=1) != run(seed=2)
    assert run(seed=1, index=0) != run(seed=1, index=1)


def test_the_requests_own_seed_wins() -> None:
    def first(own: int | None, default: int) -> list[int]:
        params = SamplingParams(temperature=2.0, seed=own)
        one = SequenceSampler(params, (1,), vocab_size=VOCAB, eos_token_ids=(), seed=default)
        return [*tokens(sample(logits_of(1, 3), [one])), int(one.uniform() * 1e9)]

    assert first(5, 1) == first(5, 2) == first(None, 5)
    assert first(None, 1) != first(None, 2)


def test_repetition_penalty_is_transformers() -> None:
    prompt, output = (3, 5, 3), (9, 5)
    one = sequence(prompt=prompt, repetition_penalty=1.7)
    for token in output:
        one.accept(token)
    row = logits_of(1, 2)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *output]]), row.clone())[0]
    found = row[0].clone()
    one.adjust(found)
    torch.testing.assert_close(found, expected)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    one = sequence(prompt=(4,), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (9, 9, 7):
        one.accept(token)
    row = logits_of(1, 2)
    expected = row[0].clone()
    expected[9] -= 0.5 + 2 * 0.25
    expected[7] -= 0.5 + 0.25
    found = row[0].clone()
    one.adjust(found)
    torch.testing.assert_close(found, expected)
    before = row.clone()
    sample(row, [one])
    assert torch.equal(row, before), "the caller's logits stay as they were"


def test_bias_decides() -> None:
    row = logits_of(1, 4)
    assert tokens(sample(row, [sequence(logit_bias={11: 100.0})])) == [11]
    best, second = row[0].topk(2).indices.tolist()
    assert tokens(sample(row, [sequence(logit_bias={best: -100.0})])) == [second]


def test_nothing_ends_before_its_minimum_length() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [0, 6, 8]] = torch.tensor([30.0, 20.0, 10.0])
    one = sequence(min_tokens=2, stop_token_ids=(6,))
    for _ in range(2):
        assert tokens(sample(row, [one])) == [8]
        one.accept(8)
    assert tokens(sample(row, [one])) == [0]
    ignoring = sequence(min_tokens=2, stop_token_ids=(6,), ignore_eos=True)
    assert tokens(sample(row, [ignoring])) == [0]


def test_dictated_tokens_are_taken_and_then_the_most_likely() -> None:
    row = logits_of(1, 6)
    one = sequence(forced_tokens=[42, 43], logprobs=0)
    for token in (42, 43):
        found = sample(row, [one])[0]
        assert isinstance(found, Sampled)
        assert found.token_id == token
        assert found.logprob is not None
        assert found.logprob.logprob == pytest.approx(row[0].log_softmax(0)[token].item(), abs=1e-5)
        one.accept(token)
    assert tokens(sample(row, [one])) == [int(row.argmax())]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(3, 5)
    asked = [sequence(logprobs=2, logit_bias={17: 100.0}), sequence(temperature=1.0), sequence(logprobs=4)]
    found = sample(logits, asked)
    first, without, last = (one.logprob for one in found if isinstance(one, Sampled))
    assert without is None
    assert first is not None
    assert last is not None
    raw = logits.log_softmax(1)
    assert first.token_id == 17
    assert first.logprob == pytest.approx(raw[0, 17].item(), abs=1e-5)
    assert list(first.top) == raw[0].topk(2).indices.tolist()
    assert list(last.top.values()) == pytest.approx(raw[2].topk(4).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_without_a_choice_fails_alone(greedy: bool) -> None:
    logits = logits_of(4, 8)
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    temperature = 0.0 if greedy else 1.0
    found = sample(logits, [sequence(temperature=temperature) for _ in range(4)])
    assert [isinstance(one, RequestError) for one in found] == [False, True, True, False]
    alone = sample(logits[3:], [sequence(temperature=temperature)])
    assert found[3] == alone[0]


def test_extreme_temperatures_stay_numbers() -> None:
    row = logits_of(1, 9)
    assert tokens(sample(row, [sequence(temperature=1e-40)])) == [int(row.argmax())]
    assert 0 <= tokens(sample(row, [sequence(temperature=1e30)]))[0] < VOCAB


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    for params in ({"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (-1,)}):
        with pytest.raises(UsageError, match=f"vocabulary of {VOCAB}"):
            sequence(**params)
