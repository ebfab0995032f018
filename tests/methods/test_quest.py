"""Quest: bounds and choice against numpy, and what every layer reads on a running model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.core.errors import StrategyError
from kvwise.methods.catalogue import parse
from kvwise.methods.selection.base import IndexShape
from kvwise.methods.selection.quest import Quest, QuestIndex
from tests.engine.runs import finish, greedy, prompts, require_empty, run
from tests.methods.recall_spy import RecallSpy, full_run_kv, require_rows
from tests.methods.selection_reference import DenseReading, ReferenceQuest

Serve = Callable[..., Any]
Load = Callable[[str], Any]
HEADS, DIM = 2, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_index(method: Quest, group: int, keys: Tensor) -> QuestIndex:
    index = method.index(IndexShape(1, HEADS * group, HEADS, DIM, torch.device("cpu")))
    index.observe(0, 5, torch.empty(0), keys[:3])
    index.build(0, 5, keys)
    return index


@given(
    num_tokens=st.integers(1, 90), num_added=st.integers(1, 80), budget=st.floats(0.01, 1.0),
    page=st.sampled_from([1, 4, 16]), group=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_choice_equals_numpy(num_tokens: int, num_added: int, budget: float, page: int, group: int, seed: int) -> None:
    method = Quest(budget, page)
    keys = random(num_tokens + num_added, HEADS, DIM, seed=seed)
    index = make_index(method, group, keys[:num_tokens])
    for key in keys[num_tokens:]:
        index.add(0, 5, key)
    query = random(HEADS * group, DIM, seed=seed + 1)
    found = index.choose(0, 5, query, 0.7, len(keys) - 1)
    assert found.shape == (HEADS, max(1, int(budget * (len(keys) - 1))))
    for h in range(HEADS):
        plain = ReferenceQuest(method, keys[:, h].double().numpy())
        assert found[h].tolist() == plain.choose(query.view(HEADS, group, DIM)[h].double().numpy() * 0.7)


def test_no_key_scores_above_its_page_s_bound() -> None:
    keys, query = random(64, HEADS, DIM), random(HEADS, DIM, seed=1)
    index = make_index(Quest(), 1, keys)
    held = index.rows[5][0]
    bounds = torch.maximum(query[:, None] * held.low, query[:, None] * held.high).sum(-1)
    scores = torch.einsum("hd,thd->ht", query, keys).unflatten(1, (4, 16)).amax(-1)
    assert (scores <= bounds).all()
    assert torch.equal(
        index._scores(held, 4, query, 1.0).argsort(-1), bounds.argsort(-1)
    )  # one query head: by bound alone


def test_only_bounds_are_kept_in_the_dtype_of_the_keys() -> None:
    keys = random(40, HEADS, DIM).bfloat16()
    index = make_index(Quest(), 1, keys)
    assert index.num_bytes == 3 * 2 * HEADS * DIM * 2  # three pages, two bounds; 40 tokens of K would be 13 times that
    for key in random(9, HEADS, DIM, seed=1):
        index.add(0, 5, key)
    assert index.num_bytes == 11 * 2 * HEADS * DIM * 2
    index.drop(5)
    index.drop(5)
    assert index.num_bytes == 0


@pytest.mark.parametrize("text", ["page=0", "keep=-1"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(StrategyError, match=f"quest: {text} is out of range"):
        parse(f"quest({text})")


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 11, "max_num_seqs": 4}, {}], ids=["chunked", "whole"])
@pytest.mark.parametrize("model", ["gpt2-tiny", "3m"])
@pytest.mark.parametrize("strategy", ["quest(budget=0.4)", "quest(budget=0.2, page=4, keep=0)"])
def test_every_layer_and_head_reads_what_the_paper_says(
    serve: Serve, load: Load, monkeypatch: pytest.MonkeyPatch, model: str, strategy: str, settings: dict[str, Any]
) -> None:
    many, forced = prompts(70, 33, 19), prompts(12, 12, 12, seed=5)
    method = parse(strategy).selection
    engine = serve(model, strategy, audit=True, **settings)
    spy = RecallSpy().watch(engine, monkeypatch)
    seen: dict[str, list[Tensor]] = {}
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):
        rows = seen.setdefault(f"r{number}", [])
        engine.add_request(
            prompt, greedy(12, forced_tokens=then), request_id=f"r{number}",
            observe=lambda index, step, logits, rows=rows: rows.append(logits.clone()),
        )  # fmt: skip
    outputs = finish(engine)
    num_full = method.full_layers(engine.memory.layout.num_layers)
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):
        dense = DenseReading(load(model), lambda keys: ReferenceQuest(method, keys), num_full)
        expected, reads = [dense.step(prompt)], iter(spy.of(f"r{number}"))
        for token in then[:-1]:
            expected.append(dense.step([token]))
            for layer, heads in sorted(dense.chosen.items()):
                read = next(reads)
                assert read.layer == layer
                assert [sorted(row) for row in read.tokens.tolist()] == [sorted(row) for row in heads]
        torch.testing.assert_close(torch.stack(seen[f"r{number}"]), torch.stack(expected), atol=2e-4, rtol=1e-4)
        told = outputs[f"r{number}"].attestation
        assert told.tokens_fetched == sum(read.tokens.numel() for read in spy.of(f"r{number}"))
    require_empty(engine)


def test_rows_on_the_device_are_those_of_their_tokens(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts(75)
    keys, values = full_run_kv(serve, "llama-tiny", prompt)
    engine = serve("llama-tiny", "quest(budget=0.3)")
    spy = RecallSpy().watch(engine, monkeypatch)
    (output,) = run(engine, [prompt], greedy(14))
    assert require_rows(spy, output.request_id, keys, values) > 0
