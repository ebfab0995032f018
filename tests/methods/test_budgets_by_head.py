"""Budgets that differ by layer and by head: the numbers, the choice, and what h2o and snapkv make of them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvwise.core.errors import StrategyError
from kvwise.core.method import Trait
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.budgets import HEADS, LAYERS, best, pyramid
from kvwise.methods.retention.h2o import H2O
from kvwise.methods.retention.snapkv import SnapKV
from tests.engine.runs import greedy, prompts, require_empty, sequence_of
from tests.methods.budgets_reference import plain_heads, plain_layers
from tests.methods.retention_views import decode_view, kept_lists, prompt_view, random_attention, victims
from tests.methods.snapkv_reference import plain_observed, plain_pooled

SHAPE = (4, 3)
DIFFERENT = [arms for arms in itertools.product(LAYERS, HEADS) if arms != ("uniform", "uniform")]


@given(num_tokens=st.integers(0, 500), share=st.floats(0, 1), num_layers=st.integers(1, 40))
def test_a_pyramid_is_a_line_through_the_uniform_number(num_tokens: int, share: float, num_layers: int) -> None:
    chosen = int(num_tokens * share)
    found = pyramid(chosen, num_tokens, num_layers).tolist()
    assert found == plain_layers("pyramid", chosen, num_tokens, num_layers)
    assert found == sorted(found, reverse=True)
    assert 0 <= min(found) <= max(found) <= num_tokens
    assert num_layers * (chosen - 1) < sum(found) <= num_layers * chosen


def test_a_pyramid_by_hand() -> None:
    assert pyramid(40, 1000, 5).tolist() == [78, 59, 40, 21, 2]
    assert pyramid(40, 60, 5).tolist() == [60, 50, 40, 30, 20]  # 78 of 60 tokens there are not


@given(num_tokens=st.integers(0, 60), chosen=st.integers(0, 70), levels=st.integers(1, 30), seed=st.integers(0, 99))
def test_heads_choose_as_sorted_lists_do(num_tokens: int, chosen: int, levels: int, seed: int) -> None:
    """Few levels make many ties."""
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (2, 3, num_tokens))).float()
    counts = torch.tensor([chosen, chosen // 2])
    for heads, choose in HEADS.items():
        found = kept_lists(choose(scores, counts))
        for layer in range(2):
            expected = plain_heads(heads, scores[layer].tolist(), int(counts[layer]))
            assert [set(row) for row in found[layer]] == expected
            assert sum(map(len, expected)) == 3 * min(int(counts[layer]), num_tokens)


def test_a_head_that_scores_low_keeps_its_floor() -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) + torch.tensor([[1.0], [0.0]])
    counts = HEADS["adakv"](scores, torch.tensor(20)).sum(-1).tolist()
    assert counts == [36, 4]


def test_of_equal_scores_the_earlier_stay() -> None:
    assert best(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), torch.tensor(3)).tolist() == [True, True, False, False, True]


# -- in the scored methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "heads"), DIFFERENT)
@given(
    num_prompt=st.integers(1, 120), num_outputs=st.integers(0, 3), budget=st.floats(0.01, 0.99),
    recent=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
@example(num_prompt=1, num_outputs=2, budget=0.5, recent=0.0, seed=0)  # two may stay of a prompt of one
def test_h2o_keeps_what_lists_say(
    layers: str, heads: str, num_prompt: int, num_outputs: int, budget: float, recent: float, seed: int
) -> None:
    method = H2O(budget, recent, layers=layers, heads=heads)
    num_tokens = num_prompt + num_outputs
    mass = np.random.default_rng(seed).random((*SHAPE, num_tokens), np.float32)
    view = prompt_view(method, num_prompt, SHAPE, num_outputs=num_outputs, mass=torch.from_numpy(mass))
    kept = method.keep(view)
    found = kept_lists(kept.mask)
    capacity = max(2, int(num_prompt * budget))
    last = max(1, int(capacity * recent))
    assert kept.limit is not None and kept.marks is not None
    assert (kept.marks == last).all()
    if num_tokens <= capacity:
        assert found == [[list(range(num_tokens))] * 3] * 4
        assert (kept.limit == capacity).all()
        return
    older = num_tokens - last
    numbers = plain_layers(layers, capacity - last, num_prompt - last, 4)
    for layer, chosen in enumerate(numbers):
        expected = plain_heads(heads, mass[layer, :, :older].tolist(), chosen)
        assert found[layer] == [sorted([*head, *range(older, num_tokens)]) for head in expected]
        assert kept.limit[layer].tolist() == [len(head) + last for head in expected]
        assert sum(map(len, expected)) == 3 * min(chosen, older)
    assert int(kept.mask.sum()) <= capacity * 12


@pytest.mark.parametrize(("layers", "heads"), DIFFERENT)
@given(
    num_prompt=st.integers(1, 80), num_outputs=st.integers(0, 3), budget=st.floats(0.01, 0.99),
    observed=st.integers(1, 40), seed=st.integers(0, 5),
)  # fmt: skip
def test_snapkv_keeps_what_lists_say(
    layers: str, heads: str, num_prompt: int, num_outputs: int, budget: float, observed: int, seed: int
) -> None:
    method = SnapKV(budget, observed, kernel=3, layers=layers, heads=heads)
    attention = random_attention(num_prompt, SHAPE, 2, seed, num_outputs=num_outputs)
    view = prompt_view(method, num_prompt, SHAPE, num_outputs=num_outputs, attention=attention)
    kept = method.keep(view)
    assert kept.limit is None
    found = kept_lists(kept.mask)
    capacity, rows = max(2, int(num_prompt * budget)), plain_observed(num_prompt, budget, observed)
    older, num_tokens = num_prompt - rows, num_prompt + num_outputs
    if num_prompt <= capacity:
        assert found == [[list(range(num_tokens))] * 3] * 4
        return
    votes = attention[:, :, :, -rows:].sum((2, 3)).numpy()
    for layer, chosen in enumerate(plain_layers(layers, capacity - rows, older, 4)):
        scores = [plain_pooled(head[:older], 3).tolist() for head in votes[layer]]
        expected = plain_heads(heads, scores, chosen)
        assert found[layer] == [sorted([*head, *range(older, num_tokens)]) for head in expected]
    assert int(kept.mask[..., :num_prompt].sum()) <= capacity * 12


def test_while_decoding_each_head_has_the_latest_tokens_that_its_marks_say() -> None:
    """Heads of unequal limits share one window of latest tokens: it comes from the marks, not from the limit."""
    method = H2O(0.5, recent=0.5, layers="pyramid")
    mass = torch.arange(100, 0, -1.0).expand(2, 1, 100)
    kept = method.keep(prompt_view(method, 100, (2, 1), mass=mass))
    assert kept.limit.flatten().tolist() == [25 + 48, 25 + 1]
    for layer, limit in enumerate([73, 26]):
        slots = torch.tensor([*range(limit - 25), *range(75, 101)], dtype=torch.int32).view(1, 1, 1, -1)
        # The younger, the less it is worth: the youngest that is not among the latest 25 leaves.
        used = torch.ones_like(slots, dtype=torch.bool)
        view = decode_view(slots, used, [101], [limit], mass=-slots.float(), marks=[25])
        assert int(slots.flatten()[int(victims(method, view))]) == 75, layer


@pytest.mark.parametrize(("layers", "heads"), DIFFERENT)
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_the_pool_holds_the_budget_within_a_page_a_head_at_every_step(
    serve: Callable[..., Any], name: str, layers: str, heads: str
) -> None:
    engine = serve("llama-tiny", f"{name}(budget=0.2, layers={layers}, heads={heads})", blocks=60)
    engine.add_request(prompts(320)[0], greedy(40), request_id="a")
    engine.step()
    layout, placement, sequence = engine.memory.layout, engine.memory.placement, sequence_of(engine, "a")
    num_heads = layout.pages_per_block
    while engine.has_unfinished():
        grown = sequence.num_computed - 320 if engine.strategy.retention.grows else 0
        counts = [len(head) for layer in placement.kept_positions(sequence) for head in layer]
        assert len(set(counts)) > 1
        assert sum(counts) <= (64 + grown) * num_heads
        if sequence.num_computed == 320:
            assert engine.memory.cache.usage().num_pages_held <= 64 / layout.block_size * num_heads + num_heads
        engine.step()
    require_empty(engine)


@pytest.mark.parametrize("kind", [H2O, SnapKV])
def test_heads_of_a_layer_are_ragged_where_they_share(kind: type[H2O | SnapKV]) -> None:
    assert Trait.RAGGED_HEADS in kind(heads="adakv").traits
    assert Trait.RAGGED_HEADS not in kind(layers="pyramid").traits
    assert kind(heads="adakv").traits > kind.traits


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_unknown_shares_are_refused(name: str) -> None:
    with pytest.raises(StrategyError, match=f"{name}: layers=steep is out of range.* one of uniform, pyramid"):
        parse(f"{name}(layers=steep)")
    with pytest.raises(StrategyError, match=f"{name}: heads=all is out of range.* one of uniform, adakv"):
        parse(f"{name}(heads=all)")
