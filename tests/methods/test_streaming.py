"""Streaming keeps the first and the latest tokens, and what was shared before stays shared and untouched."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.retention.streaming import Streaming
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.retention_views import decode_view, kept_lists, prompt_view, victims

Serve = Callable[..., Any]


def expected_positions(num_tokens: int, capacity: int, sinks: int) -> list[int]:
    """Sinks, and of the rest the last that fit."""
    if num_tokens <= capacity:
        return list(range(num_tokens))
    return [*range(sinks), *range(num_tokens - (capacity - sinks), num_tokens)]


@pytest.mark.parametrize("strategy", ["streaming(budget=0.3)", "streaming(sinks=0, window=9)", "streaming(window=40)"])
@pytest.mark.parametrize("budget", [9, 512])
def test_kept_positions_at_every_step(serve: Serve, strategy: str, budget: int) -> None:
    engine = serve("llama-tiny", f"{strategy}+prefix", max_num_batched_tokens=budget, max_num_seqs=4)
    method = engine.strategy.retention
    names = [engine.add_request(p, greedy(40)) for p in prompts(2, 16, 33, 70)]
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                capacity = method.capacity(sequence.num_prompt)
                wanted = expected_positions(sequence.num_computed, capacity, method.sinks)
                kept = engine.memory.placement.kept_positions(sequence)
                assert kept == [[wanted] * 2] * 4
                checked += 1
    assert checked == 4 * 39
    require_empty(engine)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 30, 100])
@pytest.mark.parametrize(("budget", "sinks", "window"), [(0.2, 4, None), (0.5, 0, None), (0.01, 4, None), (1.0, 2, 7)])
def test_keep_and_victims_equal_a_plain_reading(num_tokens: int, budget: float, sinks: int, window: int | None) -> None:
    method = Streaming(budget, sinks, window)
    capacity = method.capacity(num_tokens)
    kept = method.keep(prompt_view(method, num_tokens, (2, 3)))
    assert kept_lists(kept.mask) == [[expected_positions(num_tokens, capacity, sinks)] * 3] * 2
    assert kept.limit is not None and (kept.limit == capacity).all()
    order = np.random.default_rng(num_tokens).permutation(capacity + 1)  # slot order is not position order
    held = np.array([*range(sinks), *range(500 - (capacity + 1 - sinks), 500)], np.int32)[order]
    slots = torch.full((1, 2, 3, capacity + 5), 10**6, dtype=torch.int32)
    slots[..., : capacity + 1] = torch.from_numpy(held)
    used = torch.arange(capacity + 5).expand(slots.shape) <= capacity
    view = decode_view(slots, used, [500], [capacity])
    oldest = sorted(held.tolist())[sinks]
    assert (victims(method, view) == held.tolist().index(oldest)).all()


def published_bytes(engine: Engine, prompt: list[int], num_blocks: int) -> tuple[Tensor, Tensor]:
    cache, layout = engine.memory.cache, engine.memory.layout
    match = cache.match(cache.keys(np.array(prompt)), 10**6)
    assert len(match.blocks) == num_blocks
    pages = (torch.from_numpy(match.blocks).long()[:, None] * layout.pages_per_block) + torch.arange(
        layout.pages_per_block
    )
    return engine.memory.arena.keys[pages].clone(), engine.memory.arena.values[pages].clone()


def test_what_was_published_stays_matchable_and_its_bytes_untouched(serve: Serve) -> None:
    (prompt,) = prompts(100)
    exact = serve("llama-tiny", "prefix")
    run(exact, [prompt], greedy(1))
    expected = published_bytes(exact, prompt, 6)
    engine = serve("llama-tiny", "streaming(budget=0.2)+prefix", blocks=40)
    engine.add_request(prompt, greedy(60), request_id="a")
    engine.step()
    assert sequence_of(engine, "a").settled
    finish(engine)
    for before, after in zip(expected, published_bytes(engine, prompt, 6), strict=True):
        assert torch.equal(before, after)


def test_a_hit_on_what_an_evicting_request_published_is_answered_right(serve: Serve) -> None:
    shared, *tails = prompts(64, 5, 20, 9)
    many = [shared + tail for tail in tails]
    alone = [run(serve("llama-tiny", "streaming"), [p], greedy(24))[0].token_ids for p in many]
    engine = serve("llama-tiny", "streaming+prefix", max_num_batched_tokens=32, max_num_seqs=8)
    engine.add_request(many[0], greedy(24), request_id="first")
    for _ in range(8):
        engine.step()
    assert sequence_of(engine, "first").settled  # it decodes, evicting, while the others hit its prompt
    engine.add_request(many[1], greedy(24), request_id="second")
    engine.add_request(many[2], greedy(24), request_id="third")
    done = finish(engine)
    assert [done[name].token_ids for name in ("first", "second", "third")] == alone
    assert [done[name].metrics.num_cached_tokens for name in ("first", "second", "third")] == [0, 64, 64]
    require_empty(engine)


def test_for_lack_of_room_own_published_blocks_are_rewritten(serve: Serve) -> None:
    """The pool holds the prompt and hardly more: sharing gives way, the answer does not change."""
    (prompt,) = prompts(100)
    (expected,) = run(serve("llama-tiny", "streaming"), [prompt], greedy(12))
    engine = serve("llama-tiny", "streaming+prefix", blocks=8)  # 7 with the positions column
    assert engine.memory.arena.num_blocks == 7
    for _ in range(2):
        (output,) = run(engine, [prompt], greedy(12))
        assert output.token_ids == expected.token_ids
        require_empty(engine)


def test_pages_are_freed(serve: Serve) -> None:
    engine = serve("llama-tiny", "streaming(budget=0.25)", blocks=40)
    engine.add_request(prompts(256)[0], greedy(4))
    engine.step()
    assert engine.memory.cache.usage().num_pages_held == 5 * engine.memory.layout.pages_per_block
    require_empty_after(engine)


def require_empty_after(engine: Engine) -> None:
    finish(engine)
    require_empty(engine)
