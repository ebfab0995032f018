"""Who runs when: decode first under the token budget, chunks, order of arrival, preemption, shared prefixes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.output import FinishReason
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of

Serve = Callable[..., Any]


def computed(engine: Engine, names: list[str]) -> list[int]:
    """Tokens computed so far, by request; one that has ended is not known any more."""
    return [s[0].num_computed if (s := engine._requests.get(name)) else -1 for name in names]


def test_chunks_fill_the_budget_in_order_of_arrival(serve: Serve) -> None:
    engine = serve("llama-tiny", max_num_batched_tokens=20, max_num_seqs=4)
    names = [engine.add_request(p, greedy(4)) for p in prompts(30, 25, 7)]
    seen = []
    for _ in range(4):
        engine.step()
        seen.append(computed(engine, names))
    # 20; 10 + 10; 1 decode + 15 + 4; 2 decodes + 3. A decoding request computes one token a step.
    assert seen == [[20, 0, 0], [30, 10, 0], [31, 25, 4], [32, 26, 7]]


def test_a_decoding_request_never_waits_for_a_prefill(serve: Serve) -> None:
    engine = serve("llama-tiny", max_num_batched_tokens=8, max_num_seqs=4)
    first, long = prompts(5, 90)
    engine.add_request(first, greedy(10), request_id="first")
    engine.step()
    engine.add_request(long, greedy(2), request_id="long")
    for number in range(2, 11):
        (output,) = (o for o in engine.step() if o.request_id == "first")
        assert len(output.token_ids) == number
        assert engine._requests["long"][0].num_computed == 7 * (number - 1)


def test_a_step_never_exceeds_its_budget(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("llama-tiny", max_num_batched_tokens=12, max_num_seqs=6)
    sizes = []
    build = engine._builder.build
    monkeypatch.setattr(
        engine._builder, "build", lambda s, *more: sizes.append(sum(i.num_tokens for i in s)) or build(s, *more)
    )
    run(engine, prompts(40, 3, 17, 1, 29, 11, 5, 2), greedy(6))
    assert max(sizes) == 12


def test_unchunked_prompts_are_computed_in_one_step(serve: Serve) -> None:
    engine = serve("llama-tiny", max_num_batched_tokens=8, max_num_seqs=4, enable_chunked_prefill=False)
    names = [engine.add_request(p, greedy(4)) for p in prompts(30, 25)]
    engine.step()
    assert computed(engine, names) == [30, 0]
    engine.step()
    assert computed(engine, names) == [31, 25]


def test_no_more_sequences_than_allowed(serve: Serve) -> None:
    engine = serve("llama-tiny", max_num_seqs=3)
    for prompt in prompts(*[9] * 7):
        engine.add_request(prompt, greedy(3))
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats().num_running)
    assert most == 3


def test_the_latest_arrival_is_preempted_and_the_first_never(serve: Serve) -> None:
    engine = serve("llama-tiny", "full", blocks=7, max_num_seqs=3)
    many = prompts(30, 30, 30)
    outputs = run(engine, many, greedy(40))
    assert [o.metrics.num_preemptions > 0 for o in outputs] == [False, True, True]
    ends = [o.metrics.finished for o in outputs]
    assert ends == sorted(ends)
    require_empty(engine)


def test_a_preempted_request_keeps_its_tokens_and_its_place(serve: Serve) -> None:
    engine = serve("llama-tiny", "full", blocks=4, max_num_seqs=3)
    for name, prompt in zip("abc", prompts(20, 20, 20), strict=True):
        engine.add_request(prompt, greedy(30), request_id=name)
    while not engine.stats().num_preemptions:
        engine.step()
    sequence = sequence_of(engine, "b")
    assert sequence.phase is Phase.WAITING
    assert sequence.row is None
    assert sequence.num_outputs > 0
    assert [s.request_id for s in engine._scheduler.waiting] == ["b", "c"]
    done = finish(engine)
    assert all(len(done[name].token_ids) == 30 for name in "abc")


def test_same_prefix_at_once_is_computed_about_once(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix", blocks=600, max_num_seqs=64, max_num_batched_tokens=64)
    shared, *tails = prompts(160, *[5] * 64)
    outputs = run(engine, [shared + tail for tail in tails], greedy(2))
    assert all(o.error is None for o in outputs)
    # 160 shared tokens once, 64 tails of 5, and the first of two output tokens of each.
    assert sum(o.attestation.tokens_computed for o in outputs) == 160 + 64 * 5 + 64
    assert sum(o.metrics.num_cached_tokens for o in outputs) == 63 * 160
    require_empty(engine)


def test_requests_that_wait_for_a_prefix_are_not_lost_when_the_budget_ends(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix", max_num_seqs=8, max_num_batched_tokens=32)
    shared, *others = prompts(64, 40, 40)
    many = [[*shared, 1], [*shared, 2], *others, [*shared, 3]]
    assert all(o.finish_reason is FinishReason.LENGTH for o in run(engine, many, greedy(3)))


def test_requests_that_wait_for_a_prefix_keep_their_place(serve: Serve) -> None:
    clock = VirtualClock()
    engine = serve("llama-tiny", "prefix", clock=clock, max_num_seqs=2, max_num_batched_tokens=64)
    shared, other, last = prompts(32, 40, 40)
    for name, prompt in (("first", [*shared, 1]), ("twin", [*shared, 2]), ("other", other), ("last", last)):
        engine.add_request(prompt, greedy(4), request_id=name)
    done = {}
    while engine.has_unfinished():
        clock.advance(1.0)
        done |= {o.request_id: o.metrics.first_scheduled for o in engine.step() if o.finished}
    assert done["first"] == done["other"] == 1.0  # the twin waits for its prefix, and does not block the queue
    assert done["twin"] < done["last"]


def test_a_waiting_twin_computes_the_prefix_when_the_first_is_aborted(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix", max_num_seqs=8, max_num_batched_tokens=16)
    (shared,) = prompts(96)
    for name in "abc":
        engine.add_request([*shared, ord(name)], greedy(3), request_id=name)
    engine.step()
    engine.step()
    engine.abort("a")
    done = finish(engine)
    assert done["a"].finish_reason is FinishReason.ABORT
    assert len(done["b"].token_ids) == len(done["c"].token_ids) == 3
    computed = done["b"].attestation.tokens_computed + done["c"].attestation.tokens_computed
    assert computed == 96 - 32 + 2 + 4  # what the first published before it left is not computed again


def test_salted_requests_share_nothing(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix")
    (prompt,) = prompts(48)
    for salt, cached in (("", 0), ("tenant", 0), ("tenant", 32), ("", 32)):
        (output,) = run(engine, [prompt], greedy(2), salt=salt)
        assert output.metrics.num_cached_tokens == cached
    assert "other salt" in str(run(engine, [prompt], greedy(2), salt="third")[0].metrics.miss)


def test_a_request_that_no_wait_can_help_ends_with_a_reason(serve: Serve) -> None:
    """The pool would do, but what fills it is pinned: nothing runs, nothing will ever leave."""
    engine = serve("llama-tiny", "prefix", blocks=8)
    first, second = prompts(100, 100, seed=3)
    run(engine, [first], greedy(2))
    cache = engine.memory.cache
    assert cache.pin(cache.keys(np.array(first))) == 6
    (output,) = run(engine, [second], greedy(2))
    assert output.finish_reason is FinishReason.ERROR
    assert "raise kv_cache_memory_bytes" in output.error
    require_empty(engine)


def test_figures_agree_with_each_other(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix", blocks=40)
    shared, *tails = prompts(32, 8, 9)
    names = [engine.add_request(shared + tail, greedy(4)) for tail in tails]
    engine.step()
    stats = engine.stats()
    layout = engine.memory.layout
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert stats.blocks_total == 40
    assert stats.pool_bytes == 40 * layout.block_bytes
    assert stats.kv_bytes == {"device": 3 * layout.block_bytes}
    assert stats.blocks_free == 37
    assert stats.links == {}
    done = finish(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.blocks_free + stats.blocks_cached == 40
    assert stats.prefix_queries == 40 + 41
    assert stats.prefix_hits == 32 == done[names[1]].metrics.num_cached_tokens
    for name, tail in zip(names, tails, strict=True):
        told = done[name].attestation
        assert told.tokens_computed + told.tokens_reused == told.tokens_seen == 32 + len(tail) + 3


def test_times_of_a_request_are_in_order(serve: Serve) -> None:
    clock = VirtualClock(100.0)
    engine = serve("llama-tiny", clock=clock, max_num_batched_tokens=16, max_num_seqs=4)
    engine.add_request(prompts(40)[0], greedy(3), request_id="a", arrival=99.5)
    outputs = []
    while engine.has_unfinished():
        clock.advance(1.0)
        outputs += engine.step()
    times = outputs[-1].metrics
    assert (times.arrival, times.first_scheduled, times.first_token, times.finished) == (99.5, 101.0, 103.0, 105.0)
    assert times.token_times == [103.0, 104.0, 105.0]
    assert times.num_prompt_tokens == 40
