"""SnapKV keeps what the prompt's last rows voted for: against full matrices, however the prompt is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.core.errors import CapacityError, StrategyError
from kvwise.core.output import RequestOutput
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.base import Kept, PromptView
from kvwise.methods.retention.snapkv import SnapKV
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.budgets_reference import plain_heads, plain_layers
from tests.methods.dense_reference import Dense
from tests.methods.retention_views import kept_lists, prompt_view, random_attention
from tests.methods.snapkv_reference import plain_capacity, plain_kept, plain_observed, plain_pooled

Serve = Callable[..., Any]
Load = Callable[[str], Any]

STRATEGY = SnapKV(budget=0.4, observed=16, kernel=3)
LENGTHS = (45, 70, 9, 2, 33)  # the last rows of the first two span chunks; the others are shorter than 16 / 0.4
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 5}
UNCHUNKED = {"enable_chunked_prefill": False}
BOTH = pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])


# -- the method alone -------------------------------------------------------------------------------------------


@given(
    num_prompt=st.integers(1, 120), num_outputs=st.integers(0, 5), budget=st.floats(0.001, 0.999),
    observed=st.integers(1, 50), kernel=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_keep_equals_numpy(
    num_prompt: int, num_outputs: int, budget: float, observed: int, kernel: int, seed: int
) -> None:
    method = SnapKV(budget, observed, kernel)
    capacity = method.capacity(num_prompt)
    assert capacity == plain_capacity(num_prompt, budget)
    assert method.observed_rows(num_prompt) == plain_observed(num_prompt, budget, observed)
    attention = random_attention(num_prompt, (3, 2), 2, seed, num_outputs=num_outputs)
    kept = method.keep(prompt_view(method, num_prompt, (3, 2), num_outputs=num_outputs, attention=attention))
    rows = plain_observed(num_prompt, budget, observed)
    votes = attention[:, :, :, max(0, num_prompt - rows) :].sum((2, 3)).numpy()
    expected = [[plain_kept(head, num_prompt, budget, observed, kernel) for head in layer] for layer in votes]
    assert kept_lists(kept.mask) == expected
    assert {len(head) for layer in expected for head in layer} == {min(capacity, num_prompt) + num_outputs}
    assert kept.limit is None


def test_neighbours_of_a_find_stay_with_it() -> None:
    attention = torch.zeros(1, 1, 1, 100, 100)
    attention[..., -1, 40] = 1.0
    method = SnapKV(0.1, observed=5, kernel=5)
    kept = method.keep(prompt_view(method, 100, (1, 1), attention=attention))
    assert kept_lists(kept.mask)[0][0] == [38, 39, 40, 41, 42, 95, 96, 97, 98, 99]


def test_options_are_checked() -> None:
    for text in ("observed=0", "kernel=0"):
        with pytest.raises(StrategyError, match=f"snapkv: {text} is out of range: it must be at least 1"):
            parse(f"snapkv({text})")


# -- on a running engine ----------------------------------------------------------------------------------------


def expected_kept(
    loaded: Any, prompt: list[int], method: SnapKV = STRATEGY
) -> tuple[list[Tensor], list[list[list[int]]]]:
    """Observed rows [H, G, W, T] of each layer, and the positions that stay, from full matrices."""
    dense = Dense(loaded)
    dense.step(prompt)
    num_prompt, num_layers = len(prompt), loaded.num_layers
    observed = plain_observed(num_prompt, method.budget, method.observed)
    older, capacity = num_prompt - observed, plain_capacity(num_prompt, method.budget)
    numbers = plain_layers(method.layers, capacity - observed, older, num_layers)
    rows, kept = [], []
    for layer in range(num_layers):
        rows.append(dense.weights[layer][:, max(0, older) :].unflatten(0, (loaded.num_kv_heads, -1)))
        votes = rows[-1].sum((1, 2)).numpy()
        if num_prompt <= capacity:
            kept.append([list(range(num_prompt)) for _ in votes])
            continue
        scores = [plain_pooled(head[:older], method.kernel).tolist() for head in votes]
        chosen = plain_heads(method.heads, scores, numbers[layer])
        kept.append([sorted([*head, *range(older, num_prompt)]) for head in chosen])
    return rows, kept


def decoding(engine: Engine, names: list[str]) -> list[Any]:
    found = [sequence_of(engine, name) for name in names if name in engine._requests]
    return [s for s in found if s.phase is Phase.DECODE]


@BOTH
@pytest.mark.parametrize(
    ("layers", "heads"), [("pyramid", "uniform"), ("uniform", "adakv"), ("pyramid", "adakv")], ids=str
)
def test_unequal_kept_sets_equal_full_matrices_at_every_step(
    serve: Serve, load: Load, layers: str, heads: str, settings: dict[str, Any]
) -> None:
    method = SnapKV(0.4, observed=8, kernel=3, layers=layers, heads=heads)
    engine = serve("llama-tiny", str(method), blocks=60, **settings)
    many = prompts(*LENGTHS)
    expected = {len(p): expected_kept(load("llama-tiny"), p, method)[1] for p in many}
    assert len({len(head) for layer in expected[70] for head in layer}) > 1
    names = [engine.add_request(p, greedy(24)) for p in many]
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for sequence in decoding(engine, names):
            generated = list(range(sequence.num_prompt, sequence.num_computed))
            found = engine.memory.placement.kept_positions(sequence)
            assert found == [[head + generated for head in layer] for layer in expected[sequence.num_prompt]]
            checked += 1
    assert checked == len(LENGTHS) * 23
    require_empty(engine)


@BOTH
@pytest.mark.parametrize("model", ["llama-tiny", "gemma2-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("preempt", [False, True])
def test_kept_sets_equal_full_matrices_at_every_step(
    serve: Serve, load: Load, monkeypatch: pytest.MonkeyPatch, model: str, preempt: bool, settings: dict[str, Any]
) -> None:
    """Chunked or not, alone or after a preemption, whose outputs are computed again behind the prompt."""
    seen: dict[int, list[Tensor]] = {}
    keep = SnapKV.keep

    def note(self: SnapKV, view: PromptView) -> Kept:
        if view.num_prompt > view.capacity:
            seen[view.num_prompt] = [view.rows(layer)[..., : view.num_prompt] for layer in range(view.shape[0])]
        return keep(self, view)

    monkeypatch.setattr(SnapKV, "keep", note)
    engine = serve(model, str(STRATEGY), blocks=60, **settings)
    run(engine, prompts(*LENGTHS, seed=1), greedy(9))  # pages that others have used before
    many = prompts(*LENGTHS)
    expected = {len(p): expected_kept(load(model), p) for p in many}
    names = [engine.add_request(p, greedy(24)) for p in many]
    checked = 0
    for step in range(2000):
        if not engine.has_unfinished():
            break
        engine.step()
        for sequence in decoding(engine, names):
            rows, kept = expected[sequence.num_prompt]
            generated = list(range(sequence.num_prompt, sequence.num_computed))
            found = engine.memory.placement.kept_positions(sequence)
            assert found == [[head + generated for head in layer] for layer in kept]
            for found_rows, dense_rows in zip(seen.get(sequence.num_prompt, []), rows, strict=False):
                torch.testing.assert_close(found_rows, dense_rows, atol=1e-5, rtol=1e-4)
            checked += 1
            if preempt and step % 9 == 8 and sequence.num_outputs > 3:
                engine._scheduler.preempt(sequence)
    assert checked >= len(LENGTHS) * 23
    assert (engine.stats().num_preemptions > 2) == preempt
    require_empty(engine)


class DenseOverKept(Dense):
    """Reads the kept part of the prompt and all that is generated."""

    def __init__(self, loaded: Any, kept: list[list[list[int]]], num_prompt: int) -> None:
        super().__init__(loaded)
        self._kept = kept
        self._num_prompt = num_prompt

    def select(self, layer: int, logits: Tensor) -> Tensor:
        if logits.shape[-1] <= self._num_prompt:
            return logits
        hidden = torch.ones(len(self._kept[layer]), logits.shape[-1], dtype=torch.bool)
        for head, positions in enumerate(self._kept[layer]):
            hidden[head, positions] = False
        hidden[:, self._num_prompt :] = False
        return logits.masked_fill(hidden.repeat_interleave(len(logits) // len(hidden), 0)[:, None], -torch.inf)


def test_attention_is_over_the_kept_tokens_and_all_that_is_generated(serve: Serve, load: Load) -> None:
    (prompt,), (forced,) = prompts(70), prompts(40, seed=5)
    engine = serve("llama-tiny", str(STRATEGY), **CHUNKED)
    seen: list[Tensor] = []
    params = greedy(40, forced_tokens=forced)
    engine.add_request(prompt, params, observe=lambda index, step, logits: seen.append(logits.clone()))
    finish(engine)
    dense = DenseOverKept(load("llama-tiny"), expected_kept(load("llama-tiny"), prompt)[1], 70)
    expected = [dense.step(prompt), *(dense.step([token]) for token in forced[:-1])]
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=2e-4, rtol=1e-4)


# -- memory -----------------------------------------------------------------------------------------------------


def test_pages_are_freed_after_prefill_and_come_back_one_by_one(serve: Serve) -> None:
    engine = serve("llama-tiny", "snapkv(budget=0.2)", blocks=60)
    layout = engine.memory.layout
    engine.add_request(prompts(320)[0], greedy(100), request_id="a")
    engine.step()
    sequence = sequence_of(engine, "a")
    held = []
    while engine.has_unfinished():
        usage = engine.memory.cache.usage()
        held.append(usage.num_pages_held // layout.pages_per_block)
        slots = 64 + max(1, sequence.num_computed - 320)  # settled with room for the next token
        assert usage.num_pages_held == layout.num_blocks_for(slots) * layout.pages_per_block
        engine.step()
    assert held == sorted(held)
    assert (held[0], held[-1]) == (5, 11)
    told = sequence.attestation
    assert told.tokens_dropped == told.did["snapkv"] == (320 - 64) * layout.pages_per_block
    assert told.bytes_freed == 15 * layout.block_bytes
    require_empty(engine)


def test_what_outgrows_the_pool_is_preempted_and_still_served(serve: Serve) -> None:
    """Five requests hold a block each after prefill; in the end they need six, and the pool has 19."""
    many = prompts(*[60] * 5)
    engine = serve("llama-tiny", "snapkv(budget=0.2)", blocks=20, max_num_seqs=5)
    assert engine.memory.arena.num_blocks == 19
    outputs: list[RequestOutput] = run(engine, many, greedy(70))
    assert engine.stats().num_preemptions > 0
    assert all(o.error is None and len(o.token_ids) == 70 for o in outputs)
    require_empty(engine)


def test_an_output_that_can_never_be_held_is_refused(serve: Serve) -> None:
    engine = serve("llama-tiny", "snapkv(budget=0.2)", blocks=8)
    have = engine.memory.arena.num_blocks * 16
    engine.add_request(prompts(40)[0], greedy(have - 8), request_id="fits")
    with pytest.raises(CapacityError, match=rf"keeps up to {have + 1} tokens of a prompt of 40 tokens"):
        engine.add_request(prompts(40)[0], greedy(have - 7))


def test_no_masses_are_kept(serve: Serve) -> None:
    """The rows that vote are computed when the prompt has ended."""
    engine = serve("llama-tiny", "snapkv(budget=0.2)", blocks=30)
    assert "mass" not in engine.memory.arena.columns
