"""Window keeps the latest tokens and nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvwise.engine.sequence import Phase
from kvwise.methods.retention.window import Window
from tests.engine.runs import greedy, prompts, require_empty, sequence_of
from tests.methods.retention_views import decode_view, kept_lists, prompt_view, victims

Serve = Callable[..., Any]


@given(num_tokens=st.integers(1, 400), budget=st.floats(0.001, 0.999), seed=st.integers(0, 99))
def test_keep_and_victims_equal_a_plain_reading(num_tokens: int, budget: float, seed: int) -> None:
    method = Window(budget)
    capacity = method.capacity(num_tokens)
    assert capacity == max(1, int(num_tokens * budget))
    kept = method.keep(prompt_view(method, num_tokens, (2, 3)))
    assert kept_lists(kept.mask) == [[list(range(max(0, num_tokens - capacity), num_tokens))] * 3] * 2
    assert kept.limit is not None and (kept.limit == capacity).all()
    held = np.arange(500 - capacity - 1, 500, dtype=np.int32)[np.random.default_rng(seed).permutation(capacity + 1)]
    slots = torch.full((1, 2, 3, capacity + 5), -7, dtype=torch.int32)  # what lies in slots not in use
    slots[..., : capacity + 1] = torch.from_numpy(held)
    used = torch.arange(capacity + 5).expand(slots.shape) <= capacity
    assert (victims(method, decode_view(slots, used, [500], [capacity])) == int(held.argmin())).all()


def test_kept_positions_at_every_step(serve: Serve) -> None:
    engine = serve("llama-tiny", "window(budget=0.3)+prefix", max_num_batched_tokens=9, max_num_seqs=4)
    names = [engine.add_request(p, greedy(25)) for p in prompts(2, 16, 33, 70)]
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                now, capacity = sequence.num_computed, max(1, int(sequence.num_prompt * 0.3))
                assert engine.memory.placement.kept_positions(sequence) == [[list(range(now - capacity, now))] * 2] * 4
                checked += 1
    assert checked == 4 * 24
    require_empty(engine)
