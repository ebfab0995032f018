"""Top-k reads exactly the tokens of the largest attention: against numpy, full matrices and the bytes of the link."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.core.errors import UnsupportedModel
from kvwise.methods.selection.base import IndexShape
from kvwise.methods.selection.topk import TopK, TopKIndex
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.dense_reference import Dense

Serve = Callable[..., Any]
Load = Callable[[str], Any]
HEADS, DIM = 2, 8


# -- the method alone -------------------------------------------------------------------------------------------


def make_index(method: TopK, group: int, keys: Tensor, softcap: float | None = None) -> TopKIndex:
    shape = IndexShape(1, HEADS * group, HEADS, DIM, torch.device("cpu"), () if softcap is None else (softcap,))
    index = method.index(shape)
    index.observe(0, 5, torch.empty(0), keys[:3])
    index.build(0, 5, keys)
    return index


def plain_choice(query: np.ndarray, keys: np.ndarray, scale: float, softcap: float | None, num: int) -> list[set[int]]:
    """Per KV head: softmax over all tokens for each query head, added up; the query's own (last) token is not named."""
    found = []
    for h in range(HEADS):
        received = np.zeros(len(keys))
        for one in query.reshape(HEADS, -1, DIM)[h].astype(np.float64):
            logits = keys[:, h] @ one * scale
            logits = softcap * np.tanh(logits / softcap) if softcap else logits
            weights = np.exp(logits - logits.max())
            received += weights / weights.sum()
        found.append(set(np.argsort(-received[:-1])[:num].tolist()))
    return found


@given(
    num_tokens=st.integers(1, 90), num_added=st.integers(1, 80), budget=st.floats(0.01, 1.0),
    group=st.integers(1, 3), softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_choice_equals_numpy(
    num_tokens: int, num_added: int, budget: float, group: int, softcap: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_tokens + num_added, HEADS, DIM, generator=generator)
    keys[-1] *= 4  # the query's own token takes much from some query heads: the others weigh more in the sum
    index = make_index(TopK(budget), group, keys[:num_tokens], softcap)
    for key in keys[num_tokens:]:
        index.add(0, 5, key)
    query = torch.randn(HEADS * group, DIM, generator=generator)
    found = index.choose(0, 5, query, 0.7, len(keys) - 1)
    num = max(1, int(budget * (len(keys) - 1)))
    assert found.shape == (HEADS, num)
    assert [set(row) for row in found.tolist()] == plain_choice(query.numpy(), keys.numpy(), 0.7, softcap, num)


def test_keys_are_kept_as_they_are_stored_and_counted() -> None:
    keys = torch.randn(10, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    index = make_index(TopK(0.5), 1, keys.bfloat16())
    assert index.num_bytes == 10 * HEADS * DIM * 2
    index.add(0, 5, keys[0])
    assert torch.equal(index.rows[5][0].stored[:, 10], keys[0].bfloat16())
    assert index.num_bytes == 74 * HEADS * DIM * 2
    index.drop(5)
    index.drop(5)
    assert index.num_bytes == 0


# -- on a running engine ----------------------------------------------------------------------------------------


class DenseTopK(Dense):
    """While decoding, every layer and KV head reads the tokens of the largest true attention, and its own."""

    def __init__(self, loaded: Any, budget: float) -> None:
        super().__init__(loaded)
        self._budget = budget
        self._num_kv_heads = loaded.num_kv_heads
        self.num_read = 0

    def select(self, layer: int, logits: Tensor) -> Tensor:
        if logits.shape[1] > 1:
            return logits
        received = logits.softmax(-1).unflatten(0, (self._num_kv_heads, -1)).sum((1, 2))[:, :-1]
        num = max(1, int(self._budget * received.shape[-1]))
        self.num_read += num * self._num_kv_heads
        hidden = torch.ones(self._num_kv_heads, logits.shape[-1], dtype=torch.bool)
        hidden.scatter_(1, received.argsort(dim=-1, descending=True)[:, :num], False)
        hidden[:, -1] = False
        return logits.masked_fill(hidden.repeat_interleave(len(logits) // len(hidden), 0)[:, None], -torch.inf)


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 11, "max_num_seqs": 4}, {}], ids=["chunked", "whole"])
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "3m"])
@pytest.mark.parametrize("budget", [0.01, 0.15, 0.6])
def test_every_layer_reads_what_it_attends_to_most(
    serve: Serve, load: Load, model: str, budget: float, settings: dict[str, Any]
) -> None:
    (prompt,), (forced,) = prompts(70), prompts(10, seed=5)
    engine = serve(model, f"topk(budget={budget})", audit=True, **settings)
    seen: list[Tensor] = []
    params = greedy(10, forced_tokens=forced)
    engine.add_request(prompt, params, observe=lambda index, step, logits: seen.append(logits.clone()))
    (output,) = finish(engine).values()
    dense = DenseTopK(load(model), budget)
    expected = [dense.step(prompt), *(dense.step([token]) for token in forced[:-1])]
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=2e-4, rtol=1e-4)
    told, layout = output.attestation, engine.memory.layout
    assert told.tokens_fetched == dense.num_read
    assert told.recall_hits == told.recall_total == told.tokens_fetched
    assert told.fetch_candidates == sum(70 + i for i in range(9)) * layout.pages_per_block
    assert told.bytes_fetched == told.tokens_fetched * 2 * layout.head_dim * 4
    assert engine.memory.placement._tiers._fetch_link.num_bytes == told.bytes_fetched  # they really moved


def test_a_softcap_and_a_half_precision_pool_are_part_of_the_truth(serve: Serve) -> None:
    engine = serve("gemma2-tiny", "topk(budget=0.3)", audit=True, max_model_len=8, kv_cache_dtype="bfloat16")
    (output,) = run(engine, prompts(4), greedy(4))
    assert output.error is None
    assert output.attestation.recall_hits == output.attestation.recall_total > 0
    with pytest.raises(UnsupportedModel, match="topk cannot serve"):
        serve("gemma2-tiny", "topk")


def test_no_layer_stays_on_the_device_but_its_keys_for_scoring(serve: Serve) -> None:
    engine = serve("llama-tiny", "topk", blocks=40, max_num_batched_tokens=64, max_num_seqs=2)
    layout = engine.memory.layout
    engine.add_request(prompts(100)[0], greedy(20), request_id="a")
    engine.step()
    engine.step()
    assert sequence_of(engine, "a").settled
    assert engine.memory.cache.usage().num_pages_held == 0
    stats = engine.stats()
    assert stats.kv_bytes["host"] == 7 * layout.block_bytes
    assert engine.memory.placement.index.num_bytes == 100 * layout.token_bytes // 2  # K, and no V
    assert stats.kv_bytes["device"] == 100 * layout.token_bytes // 2 + engine.memory.placement._tiers.staged_bytes
    (output,) = finish(engine).values()
    assert output.attestation.bytes_freed == 7 * layout.block_bytes
    assert output.attestation.did == {"topk": output.attestation.tokens_fetched}
    require_empty(engine)


def test_an_engine_that_looks_ahead_on_the_same_model_does_not_disturb(serve: Serve) -> None:
    (prompt,) = prompts(50)
    (expected,) = run(serve("llama-tiny", "topk"), [prompt], greedy(8))
    other, engine = serve("llama-tiny", "infinigen"), serve("llama-tiny", "topk")
    run(other, [prompt], greedy(2))
    (output,) = run(engine, [prompt], greedy(8))
    assert output.token_ids == expected.token_ids
    assert output.attestation == expected.attestation
