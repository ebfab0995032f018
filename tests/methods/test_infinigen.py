"""InfiniGen fetches what it says: choice against numpy, bytes against a full run, memory and figures by count."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UnsupportedModel
from kvwise.methods.selection.base import IndexShape, near
from kvwise.methods.selection.infinigen import InfiniGen, InfiniGenIndex, skew
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.recall_spy import DenseOverChosen, RecallSpy, full_run_kv, require_rows

Serve = Callable[..., Any]
Load = Callable[[str], Any]
CPU = torch.device("cpu")


# -- the method alone -------------------------------------------------------------------------------------------


def require_near(found: Tensor, scores: np.ndarray, alpha: float, most: int) -> None:
    """SYSTEMS card, step by step: count within alpha of the best, mean over heads, top-n' of each head.

    The best tokens of the query heads of one KV head tie (all are 0 behind), so values are compared, not ids.
    """
    behind = scores - scores.max(-1, keepdims=True)
    num = min(max(1, math.ceil((behind > -alpha).sum(-1).mean())), most, scores.shape[-1])
    assert found.shape == (len(scores), num)
    for tokens, row in zip(found.tolist(), behind.max(1), strict=True):
        assert len(set(tokens)) == num
        np.testing.assert_allclose(np.sort(row[tokens]), np.sort(row)[-num:], atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, 1e9])
@pytest.mark.parametrize("most", [1, 9, 1000])
@pytest.mark.parametrize("group", [1, 3])
def test_near_equals_numpy(alpha: float, most: int, group: int) -> None:
    scores = np.random.default_rng(3).normal(size=(4, group, 50)).astype(np.float32)
    require_near(near(torch.from_numpy(scores), alpha, most), scores, alpha, most)


def test_a_skew_is_a_rotation_that_gathers_queries_in_few_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 16, 16, generator=generator) * torch.linspace(3, 0.1, 16)[:, None]
    queries, keys = torch.randn(2, 200, 16, generator=generator) @ mix, torch.randn(2, 50, 16, generator=generator)
    turned = skew(queries)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(16).expand(2, 16, 16), atol=1e-5, rtol=0)
    plain = queries @ keys.transpose(1, 2)
    torch.testing.assert_close((queries @ turned) @ (keys @ turned).transpose(1, 2), plain, atol=1e-3, rtol=1e-4)
    energy = (queries @ turned).square().sum(1)
    assert bool((energy[:, :-1] >= energy[:, 1:]).all())  # strongest first
    assert bool((energy[:, :5].sum(1) / energy.sum(1) > queries.square().sum(1)[:, :5].sum(1) / energy.sum(1)).all())


HEADS, GROUP, DIM = 2, 3, 16


def make_index(method: InfiniGen, seed: int = 0) -> tuple[InfiniGenIndex, Tensor, Tensor]:
    """An index of one row over a prompt of 60 tokens, seen in three chunks: (index, queries, keys)."""
    generator = torch.Generator().manual_seed(seed)
    index = method.index(IndexShape(2, HEADS * GROUP, HEADS, DIM, CPU))
    tilt = torch.linspace(2, 0.2, DIM)
    index.calibrate(1, torch.randn(100, HEADS * GROUP, DIM, generator=generator) * tilt, torch.empty(0))
    queries = torch.randn(60, HEADS * GROUP, DIM, generator=generator) * tilt
    keys = torch.randn(60, HEADS, DIM, generator=generator)
    for chunk in (slice(0, 7), slice(7, 40), slice(40, 60)):
        index.observe(1, 5, queries[chunk], keys[chunk])
    index.build(1, 5, keys)
    return index, queries, keys


def plain_columns(index: InfiniGenIndex, queries: Tensor, keys: Tensor, num: int) -> list[set[int]]:
    turned = index.skews[1].numpy()
    found = []
    for h in range(HEADS):
        weight = np.zeros(DIM)
        for g in range(GROUP):
            weight += np.abs(queries[:, h * GROUP + g].numpy() @ turned[h]).sum(0)
        weight += np.abs(keys[:, h].numpy() @ turned[h]).sum(0)
        found.append(set(np.argsort(-weight)[:num].tolist()))
    return found


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_columns_are_those_with_the_largest_q_plus_k(ratio: float) -> None:
    index, queries, keys = make_index(InfiniGen(ratio=ratio))
    num = max(1, round(ratio * DIM))
    columns = index.rows[5][1].columns
    assert [set(row.tolist()) for row in columns] == plain_columns(index, queries, keys, num)
    assert index.num_bytes == HEADS * 60 * num * 4


@pytest.mark.parametrize(("alpha", "budget", "ratio"), [(1.0, 0.2, 0.3), (0.3, 1.0, 0.5), (100.0, 0.1, 1.0)])
def test_choice_equals_numpy_also_for_added_tokens(alpha: float, budget: float, ratio: float) -> None:
    index, queries, keys = make_index(InfiniGen(budget=budget, alpha=alpha, ratio=ratio))
    generator = torch.Generator().manual_seed(9)
    for _ in range(70):  # more than the index first had room for
        new = torch.randn(HEADS, DIM, generator=generator)
        index.add(1, 5, new)
        keys = torch.cat([keys, new[None]])
    turned, columns = index.skews[1].numpy(), index.rows[5][1].columns.numpy()
    for query in queries[:5]:
        scores = np.zeros((HEADS, GROUP, len(keys)), np.float32)
        for h in range(HEADS):
            partial = (keys[:, h].numpy() @ turned[h])[:, columns[h]]
            for g in range(GROUP):
                scores[h, g] = partial @ (query[h * GROUP + g].numpy() @ turned[h])[columns[h]] * 0.25
        found = index.choose(1, 5, query, 0.25, len(keys))
        require_near(found, scores, alpha, max(1, int(budget * len(keys))))
        assert found.shape[1] <= max(1, int(budget * len(keys)))


def test_all_columns_rank_as_the_true_scores_do() -> None:
    index, queries, keys = make_index(InfiniGen(budget=0.1, alpha=1e9, ratio=1.0))
    for query in queries[:5]:
        scores = torch.einsum("hgd,thd->hgt", query.view(HEADS, GROUP, DIM), keys)
        best = (scores - scores.amax(-1, keepdim=True)).amax(1).topk(6).indices
        assert [set(r) for r in index.choose(1, 5, query, 1.0, len(keys)).tolist()] == [set(r) for r in best.tolist()]


def test_a_dropped_row_is_forgotten() -> None:
    index, _, _ = make_index(InfiniGen())
    index.drop(5)
    index.drop(5)
    assert index.num_bytes == 0


# -- on a running engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "3m"])
def test_fetched_rows_are_the_chosen_tokens_kv(serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    (prompt,) = prompts(75)
    keys, values = full_run_kv(serve, model, prompt)
    engine = serve(model, "infinigen(budget=0.4)")
    spy = RecallSpy().watch(engine, monkeypatch)
    (output,) = run(engine, [prompt], greedy(12))
    num_heads, num_layers = engine.memory.layout.num_kv_heads, engine.memory.layout.num_layers
    assert [read.layer for read in spy.reads] == list(range(1, num_layers)) * 11  # layer 0 is read in full
    for number, read in enumerate(spy.reads):
        num_tokens = 75 + number // (num_layers - 1)
        assert read.tokens.shape[0] == num_heads  # as many for each head, never more than the budget
        assert 1 <= read.tokens.shape[1] <= max(1, int(0.4 * num_tokens))
        assert all(len(set(row)) == len(row) for row in read.tokens.tolist())
    assert require_rows(spy, output.request_id, keys, values) > 0
    assert sum(read.tokens.numel() for read in spy.reads) == output.attestation.tokens_fetched


def test_attention_is_over_the_fetched_tokens_and_the_new_one(
    serve: Serve, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,), (forced,) = prompts(70), prompts(10, seed=5)
    engine = serve("llama-tiny", "infinigen(budget=0.15)")
    spy = RecallSpy().watch(engine, monkeypatch)
    seen: list[Tensor] = []
    params = greedy(10, forced_tokens=forced)
    engine.add_request(prompt, params, observe=lambda index, step, logits: seen.append(logits.clone()))
    finish(engine)
    dense = DenseOverChosen(load("llama-tiny"))
    expected = [dense.step(prompt)]
    for i, token in enumerate(forced[:-1]):
        dense.chosen = {read.layer: read.tokens for read in spy.reads[3 * i : 3 * i + 3]}
        expected.append(dense.step([token]))
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_a_batch_is_served_as_each_request_alone(serve: Serve) -> None:
    many = prompts(20, 90, 33, 64, 5)
    strategy = "infinigen(budget=0.3)"
    alone = [run(serve("llama-tiny", strategy), [p], greedy(12))[0] for p in many]
    batch = run(serve("llama-tiny", strategy, max_num_batched_tokens=24, max_num_seqs=5), many, greedy(12))
    assert [o.token_ids for o in batch] == [o.token_ids for o in alone]
    for one, other in zip(alone, batch, strict=True):
        assert one.attestation.tokens_fetched == other.attestation.tokens_fetched


def test_engines_that_share_a_model_do_not_fetch_for_each_other(serve: Serve) -> None:
    (prompt,) = prompts(50)
    first, second = serve("llama-tiny", "infinigen"), serve("llama-tiny", "infinigen")
    one, other = (run(engine, [prompt], greedy(8))[0] for engine in (first, second))
    assert one.token_ids == other.token_ids
    assert one.attestation == other.attestation
    assert one.attestation.fetch_candidates == sum(50 + i for i in range(7)) * 3 * 2


def test_device_pages_return_and_host_bytes_are_counted(serve: Serve) -> None:
    engine = serve("llama-tiny", "infinigen", blocks=40, max_num_batched_tokens=64, max_num_seqs=2)
    layout = engine.memory.layout
    engine.add_request(prompts(100)[0], greedy(20), request_id="a")
    engine.step()
    usage = engine.memory.cache.usage()
    assert usage.num_pages_held == 7 * layout.pages_per_block  # in prefill the prompt is on the device
    engine.step()
    sequence = sequence_of(engine, "a")
    assert sequence.settled
    assert engine.memory.cache.usage().num_pages_held == 7 * layout.num_kv_heads  # layer 0 only
    stats = engine.stats()
    assert stats.kv_bytes["host"] == 7 * layout.block_bytes
    staged = engine.memory.placement.kv_bytes()["device"]
    assert stats.kv_bytes["device"] == 7 * layout.num_kv_heads * layout.page_bytes + staged
    assert staged >= engine.memory.placement.index.num_bytes > 0
    (output,) = finish(engine).values()
    told = output.attestation
    assert told.bytes_freed == (7 * layout.pages_per_block - 7 * layout.num_kv_heads) * layout.page_bytes
    assert told.bytes_fetched == told.tokens_fetched * 2 * layout.head_dim * 4
    assert told.did == {"infinigen": told.tokens_fetched}
    assert engine.memory.placement.index.num_bytes == 0
    require_empty(engine)


def test_the_share_read_and_the_recall_are_told(serve: Serve) -> None:
    engine = serve("3m", "infinigen(budget=0.2)", audit=True)
    (output,) = run(engine, prompts(200), greedy(16))
    told = output.attestation
    layers, heads = engine.memory.layout.num_layers, engine.memory.layout.num_kv_heads
    assert told.fetch_candidates == sum(200 + i for i in range(15)) * (layers - 1) * heads
    share = told.tokens_fetched / told.fetch_candidates
    assert 0 < share <= 0.2
    assert told.recall_total == told.tokens_fetched
    recall = told.recall_hits / told.recall_total
    print(f"share fetched {share:.3f}, recall {recall:.3f}")  # shown by pytest -s
    assert share < recall < 1  # better than chance, which would find the share


def test_recall_is_whole_when_all_is_fetched(serve: Serve) -> None:
    engine = serve("llama-tiny", "infinigen(alpha=1e9, budget=1, ratio=1)", audit=True)
    (output,) = run(engine, prompts(60), greedy(8))
    told = output.attestation
    assert told.recall_hits == told.recall_total == told.tokens_fetched == told.fetch_candidates


def test_recall_is_not_told_unless_asked(serve: Serve) -> None:
    (output,) = run(serve("llama-tiny", "infinigen"), prompts(40), greedy(4))
    assert output.attestation.recall_total == 0
    assert output.attestation.tokens_fetched > 0


def test_half_precision_pools(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("llama-tiny", "infinigen", kv_cache_dtype="bfloat16")
    (output,) = run(engine, prompts(60), greedy(8))
    assert output.error is None
    assert output.attestation.bytes_fetched == output.attestation.tokens_fetched * 2 * 16 * 2


def test_sliding_windows_are_refused_beyond_their_length(serve: Serve, load: Load) -> None:
    with pytest.raises(UnsupportedModel, match=r"sliding window of 8 tokens: set max_model_len to at most 8"):
        serve("mistral-tiny", "infinigen")
    engine = serve("mistral-tiny", "infinigen(alpha=1e9, budget=1, ratio=1)", max_model_len=8)
    exact = serve("mistral-tiny", "full", max_model_len=8)
    many = prompts(3, 4)
    assert [o.token_ids for o in run(engine, many, greedy(4))] == [o.token_ids for o in run(exact, many, greedy(4))]
