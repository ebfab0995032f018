"""Random keeps what a hash says, at every step and after a preemption: against the same hash in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvwise.core.errors import StrategyError
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.random import Random, priorities
from tests.engine.runs import greedy, prompts, require_empty, sequence_of
from tests.methods.random_reference import mix, plain_kept, plain_priorities
from tests.methods.retention_views import decode_view, kept_lists, prompt_view, victims

Serve = Callable[..., Any]


def test_the_mixing_function_is_murmurs_finalizer() -> None:
    known = {0: 0, 1: 0x514E28B7, 0xFFFFFFFF: 0x81F16F39}
    assert {x: int(mix(np.uint32(x))) for x in known} == known


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 2**31 - 200))
def test_priorities_equal_numpy(seed: int, start: int) -> None:
    positions = torch.arange(start, start + 100, dtype=torch.int32).expand(3, 2, -1)
    found = priorities(seed, positions)
    for layer in range(3):
        for head in range(2):
            expected = plain_priorities(seed, layer, head, np.arange(start, start + 100))
            np.testing.assert_array_equal(found[layer, head].numpy(), expected)
            assert len(set(expected.tolist())) == 100


def test_priorities_are_spread_evenly_and_independently() -> None:
    found = priorities(0, torch.arange(20_000, dtype=torch.int32).expand(2, 2, -1)).double() / 2**32
    assert ((found.mean(-1) - 0.5).abs() < 0.01).all()
    counts = torch.stack([torch.histc(row.float(), 20, 0, 1) for row in found.flatten(0, 1)])
    assert ((counts - 1000).abs() < 150).all()  # five standard deviations of a fair draw
    correlation = torch.corrcoef(found.flatten(0, 1)) - torch.eye(4)
    assert correlation.abs().max() < 0.04
    assert abs(float(torch.corrcoef(torch.stack([found[0, 0, :-1], found[0, 0, 1:]]))[0, 1])) < 0.04


@given(
    num_tokens=st.integers(1, 300), budget=st.floats(0.001, 0.999), recent=st.integers(1, 40), seed=st.integers(0, 9)
)
def test_keep_equals_numpy(num_tokens: int, budget: float, recent: int, seed: int) -> None:
    method = Random(budget, seed, recent)
    capacity = method.capacity(num_tokens)
    assert capacity == max(1, int(num_tokens * budget))
    kept = method.keep(prompt_view(method, num_tokens, (3, 2)))
    expected = [
        [plain_kept(seed, layer, head, num_tokens, capacity, recent) for head in range(2)] for layer in range(3)
    ]
    assert kept_lists(kept.mask) == expected
    assert kept.limit is not None and (kept.limit == capacity).all()


@pytest.mark.parametrize("recent", [1, 3, 8, 100])
def test_one_in_one_out_leads_to_the_same_choice_as_all_at_once(recent: int) -> None:
    method, capacity = Random(0.5, 3, recent), 20
    slots = torch.stack([torch.tensor([*plain_kept(3, 0, h, 50, capacity, recent), 50]) for h in range(2)])
    for num_tokens in range(51, 200):
        used = torch.ones((1, 1, 2, capacity + 1), dtype=torch.bool)
        victim = victims(method, decode_view(slots[None, None].int(), used, [num_tokens], [capacity]))[0, 0]
        for head in range(2):
            kept = [p for i, p in enumerate(slots[head].tolist()) if i != int(victim[head])]
            assert sorted(kept) == plain_kept(3, 0, head, num_tokens, capacity, recent)
            slots[head, victim[head]] = num_tokens


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_kept_positions_at_every_step_also_after_a_preemption(serve: Serve, max_num_seqs: int) -> None:
    strategy = "random(budget=0.3, seed=7, recent=4)+prefix"
    engine = serve("llama-tiny", strategy, max_num_batched_tokens=9, max_num_seqs=max_num_seqs)
    names = [engine.add_request(p, greedy(25)) for p in prompts(2, 16, 33, 70)]
    checked = 0
    for step in range(2000):
        if not engine.has_unfinished():
            break
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                capacity = max(1, int(sequence.num_prompt * 0.3))
                expected = [
                    [plain_kept(7, layer, head, sequence.num_computed, capacity, 4) for head in range(2)]
                    for layer in range(4)
                ]
                assert engine.memory.placement.kept_positions(sequence) == expected
                checked += 1
                if step % 10 == 5:
                    engine._scheduler.preempt(sequence)
    assert engine.stats().num_preemptions > 3
    assert checked >= 4 * 24
    require_empty(engine)


def test_a_seed_outside_32_bits_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"seed=4294967296 is out of range: it must be 0 to 4294967295"):
        parse("random(seed=4294967296)")
    with pytest.raises(StrategyError, match=r"recent=0 is out of range"):
        parse("random(recent=0)")
