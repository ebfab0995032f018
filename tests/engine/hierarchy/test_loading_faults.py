"""Tiers that fail while requests count on them: the answer is that of a clean run, nothing leaks, and it is told."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvwise.core.clock import VirtualClock
from kvwise.core.output import FinishReason, RequestOutput
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.drivers import VirtualDriver
from kvwise.engine.meter import VirtualMeter
from kvwise.engine.sequence import Phase
from kvwise.models.load import load_model
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.breaker import BreakerState
from kvwise.tiers.record import header_bytes
from tests.engine.hierarchy.tiering import (
    BROKEN,
    KINDS,
    WITHIN_S,
    Alter,
    Patient,
    Unruly,
    check,
    cut_to,
    failing,
    flipped,
    hierarchy_of,
    leave_device,
    loads_of,
    require_idle,
    rig,
    store,
    tier_text,
)
from tests.engine.runs import LIMIT, finish, greedy, prompts, run, sequence_of
from tests.tiers.redis_server import RedisServer

Serve = Callable[..., Any]

METHODS = ("load", "cake(chunk=32)", "layerwise")
NUM_TOKENS = 5
PROMPT, OTHER, COLD = prompts(150, 90, 40)
BLOCKS = 9  # full blocks of PROMPT that can be loaded
LAYERS = 4


@pytest.fixture(scope="module")
def answers(load: Callable[[str], Any]) -> dict[tuple[int, ...], list[int]]:
    """The tokens of a clean run, by prompt."""
    from kvwise.core.config import EngineConfig
    from kvwise.methods.catalogue import parse

    with Engine(load("llama-tiny"), parse("full"), EngineConfig(kv_cache_memory_bytes=1 << 21)) as engine:
        many = [PROMPT, OTHER, COLD]
        return {tuple(p): o.token_ids for p, o in zip(many, run(engine, many, greedy(NUM_TOKENS)), strict=True)}


@pytest.fixture
def require_right(answers: dict[tuple[int, ...], list[int]]) -> Callable[..., None]:
    def require(*outputs: RequestOutput) -> None:
        for output in outputs:
            assert output.error is None
            assert output.token_ids == answers[tuple(output.prompt_token_ids)]

    return require


def make(serve: Serve, method: str, tier: str = "memory(size=4MiB)", **settings: Any) -> Any:
    """An engine over one tier that holds PROMPT and OTHER, whose steps wait for what is being loaded."""
    meter = Patient()
    settings = {"max_num_batched_tokens": 32, "max_num_seqs": 4, **settings}
    engine = serve("llama-tiny", f"full+prefix+{method}", tiers=[tier], meter=meter, **settings)
    store(engine, [PROMPT, OTHER], greedy(NUM_TOKENS))
    meter.engine = engine
    return engine


def ask(engine: Any, prompt: list[int] = PROMPT) -> RequestOutput:
    (output,) = run(engine, [prompt], greedy(NUM_TOKENS))
    return output


def faults(engine: Any) -> dict[str, int]:
    """Counters of the first tier."""
    return dict(hierarchy_of(engine).tiers[0].stats().num_faults)


def only(block: int, engine: Any, alter: Alter) -> Alter:
    """Alters the record of one block of PROMPT."""
    key = engine.memory.cache.keys(torch.tensor(PROMPT).numpy()).chain[block]

    def chosen(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        return alter(extent, view) if extent.key == key else view

    return chosen


# -- records that come back wrong ---------------------------------------------------------------------------------

HEADER = header_bytes(LAYERS)


@pytest.mark.parametrize("block", [0, 4, BLOCKS - 1])
@pytest.mark.parametrize(
    ("alter", "kind"),
    [
        (flipped(-1000), "corrupt"),
        (flipped(40), "corrupt"),
        (cut_to(HEADER + 5), "corrupt"),
        (cut_to(0), "corrupt"),
        (failing(Fault(FaultKind.MISSING)), "not there"),
        (failing(BROKEN), "i/o error"),
    ],
    ids=["payload", "header", "cut", "empty", "missing", "unreadable"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_record_is_computed(
    serve: Serve, require_right: Any, method: str, alter: Alter, kind: str, block: int
) -> None:
    engine = make(serve, method)
    rig(engine).alter = only(block, engine, alter)
    output = ask(engine)
    require_right(output)
    assert output.attestation.tokens_loaded <= 16 * (BLOCKS - 1)
    if method != "layerwise":  # the others came
        assert output.attestation.tokens_loaded >= 16
    if block == BLOCKS - 1 or not method.startswith("cake"):  # cake may have computed it before its turn
        assert faults(engine)[kind] >= 1
        told = {"corrupt": "corrupt", "not there": "tier fault", "i/o error": "tier fault"}[kind]
        assert told in str(output.metrics.miss)
    require_idle(engine)
    require_right(ask(engine, OTHER))


@pytest.mark.parametrize("method", METHODS)
def test_swapped_records_are_foreign(serve: Serve, require_right: Any, method: str) -> None:
    """F10: each record is sound, and under the other's key."""
    engine = make(serve, method)
    unruly = rig(engine)
    keys = [engine.memory.cache.keys(torch.tensor(p).numpy()).chain for p in (PROMPT, OTHER)]
    swap = dict(zip(keys[0], keys[1], strict=False))

    def alter(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        other = swap.get(extent.key)
        return view if other is None else unruly.inner.read([extent._replace(key=other)])[0]

    unruly.alter = alter
    output = ask(engine)
    require_right(output)
    assert output.attestation.tokens_loaded <= 16 * (BLOCKS - len(swap))
    assert faults(engine).get("foreign", 0) + faults(engine).get("corrupt", 0) >= 1
    assert "corrupt" in str(output.metrics.miss)
    require_idle(engine)


def test_a_bad_record_is_gone_and_stored_anew(serve: Serve, require_right: Any) -> None:
    engine = make(serve, "load")
    unruly = rig(engine)
    unruly.alter = only(2, engine, flipped(-1000))
    require_right(ask(engine))
    unruly.alter = None
    leave_device(engine)
    assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS


@pytest.mark.parametrize("kind", KINDS)
def test_records_deleted_between_look_up_and_read(serve: Serve, require_right: Any, tmp_path: Path, kind: str) -> None:
    """F12: not there, no second attempt."""
    engine = make(serve, "load", tier_text(kind, tmp_path))
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    tier = hierarchy_of(engine).tiers[0]
    unruly.inner.delete([entry.key for entry in tier.index.entries()])
    unruly.read_gate.set()
    output = finish(engine)["a"]
    require_right(output)
    assert output.attestation.tokens_loaded == 0
    assert unruly.num_reads == 1
    assert faults(engine)["not there"] == BLOCKS
    require_idle(engine)


def test_a_folder_emptied_behind_the_engine(serve: Serve, require_right: Any, tmp_path: Path) -> None:
    engine = make(serve, "load", tier_text("disk", tmp_path))
    for path in (tmp_path / "disk").iterdir():
        path.write_bytes(b"\x00" * path.stat().st_size)
    output = ask(engine)
    require_right(output)
    assert output.attestation.tokens_loaded == 0
    assert faults(engine)
    leave_device(engine)
    output = ask(engine)  # it was stored anew
    require_right(output)
    assert output.attestation.tokens_loaded == 16 * BLOCKS


# -- tiers that hang ----------------------------------------------------------------------------------------------


def step_until(engine: Any, done: Callable[[], bool]) -> dict[str, RequestOutput]:
    outputs = {}
    for _ in range(LIMIT):
        if done():
            return outputs
        outputs.update({o.request_id: o for o in engine.step() if o.finished})
    raise AssertionError("it does not come to that")


@pytest.mark.parametrize("method", METHODS)
def test_a_hung_tier_is_given_up_and_its_late_answer_harms_nobody(
    serve: Serve, require_right: Any, method: str
) -> None:
    """F14, F27: others go on meanwhile; after the deadline the prompt is computed; the bytes come when all is over."""
    clock = VirtualClock()
    engine = make(serve, method, clock=clock, tier_deadline_s=5.0)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None  # nothing comes that a step could wait for
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="hung")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    engine.add_request(COLD, greedy(NUM_TOKENS), request_id="cold")
    done = step_until(engine, lambda: "cold" not in engine._requests)
    require_right(done["cold"])
    if not method.startswith("cake"):
        assert "hung" in engine._requests
        clock.advance(4.9)
        for _ in range(3):
            engine.step()
        assert sequence_of(engine, "hung").num_computed == 0
    clock.advance(5.2)
    done |= finish(engine)
    require_right(done["hung"])
    assert done["hung"].attestation.tokens_loaded == 0
    assert engine.memory.cache.usage().num_referenced == BLOCKS
    engine.memory.cache.check()
    unruly.read_gate.set()
    require_idle(engine)
    require_right(ask(engine, OTHER), ask(engine))


@pytest.mark.parametrize("method", METHODS)
def test_a_late_answer_does_not_touch_what_was_computed_meanwhile(serve: Serve, method: str) -> None:
    """It is wrong, too: what it leaves in the blocks would be rubbish, while the request still answers from them."""
    clock = VirtualClock()
    expected = run(serve("llama-tiny", "full"), [PROMPT], greedy(40))[0].token_ids
    engine = make(serve, method, clock=clock, tier_deadline_s=5.0)
    unruly = rig(engine)
    unruly.read_gate.clear()
    unruly.alter = lambda extent, view: view if isinstance(view, Fault) else memoryview(scrambled(view))
    engine._runner._meter.engine = None
    engine.add_request(PROMPT, greedy(40), request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    clock.advance(5.1)
    step_until(engine, lambda: sequence_of(engine, "a").num_outputs >= 3)
    (load,) = loads_of(engine)._leaving
    unruly.read_gate.set()
    with load.news:
        assert load.news.wait_for(lambda: load.is_over, WITHIN_S)
    assert finish(engine)["a"].token_ids == expected
    require_idle(engine)


def scrambled(view: memoryview) -> bytearray:
    """A record whose header is sound, and nothing else."""
    data = bytearray(view)
    for at in range(HEADER + 1, len(data), 2):
        data[at] ^= 0x41
    return data


def test_a_hung_transfer_counts_once_against_its_tier(serve: Serve) -> None:
    clock = VirtualClock()
    engine = make(serve, "load", clock=clock, tier_deadline_s=5.0)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None
    engine.add_request(PROMPT, greedy(NUM_TOKENS))
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    clock.advance(5.1)
    finish(engine)
    assert hierarchy_of(engine).tiers[0].breaker.num_failures == 1
    unruly.read_gate.set()
    require_idle(engine)


def test_three_hung_transfers_open_the_breaker(serve: Serve, require_right: Any) -> None:
    clock = VirtualClock()
    engine = make(serve, "load", clock=clock, tier_deadline_s=5.0, blocks=400)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None
    for _ in range(3):
        engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
        engine.step()
        assert unruly.reading.wait(WITHIN_S)
        unruly.reading.clear()
        clock.advance(5.1)
        require_right(finish(engine)["a"])
        engine.memory.cache.clear()
    assert hierarchy_of(engine).tiers[0].breaker.state is BreakerState.OPEN
    output = ask(engine)  # nobody asks the tier any more
    assert not unruly.reading.is_set()
    assert "tier fault" in str(output.metrics.miss)
    unruly.read_gate.set()
    require_idle(engine)


def test_a_hung_write_holds_up_nobody(serve: Serve, require_right: Any) -> None:
    engine = serve("llama-tiny", "full+prefix+load", tiers=["memory(size=4MiB)"], blocks=40, max_num_batched_tokens=32,
                   max_num_seqs=4)  # fmt: skip
    unruly = rig(engine)
    unruly.write_gate.clear()
    for _ in range(2):
        require_right(*run(engine, [PROMPT, OTHER, COLD], greedy(NUM_TOKENS)))
        assert unruly.writing.wait(WITHIN_S)
        assert engine.memory.cache.usage().num_referenced <= 20  # half of the pool
        engine.memory.cache.clear()
    unruly.write_gate.set()
    require_idle(engine)


def test_a_request_as_large_as_the_pool_waits_for_blocks_that_are_being_written(
    serve: Serve, require_right: Any
) -> None:
    engine = serve("llama-tiny", "full+prefix+load", tiers=["memory(size=4MiB)"], blocks=10, max_num_seqs=4)
    unruly = rig(engine)
    unruly.write_gate.clear()
    require_right(ask(engine, OTHER))
    assert unruly.writing.wait(WITHIN_S)
    threading.Timer(0.05, unruly.write_gate.set).start()
    require_right(ask(engine, PROMPT))
    require_idle(engine)


def test_a_request_as_large_as_the_pool_waits_for_a_load_whose_request_has_gone(
    serve: Serve, require_right: Any
) -> None:
    engine = make(serve, "load", blocks=10)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine.add_request(OTHER, greedy(NUM_TOKENS), request_id="gone")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    engine.abort("gone")
    threading.Timer(0.05, unruly.read_gate.set).start()
    require_right(ask(engine, PROMPT))
    require_idle(engine)


def test_settling_waits_for_blocks_that_are_being_written(serve: Serve) -> None:
    (prompt,) = prompts(30)
    expected = run(serve("llama-tiny", "streaming(window=57)"), [prompt], greedy(60))[0].token_ids
    for offload in ("through", "back"):
        engine = serve(
            "llama-tiny", "streaming(window=57)+prefix+load", tiers=["memory(size=4MiB)"], blocks=5, offload=offload
        )
        unruly = rig(engine)
        unruly.write_gate.clear()
        threading.Timer(0.05, unruly.write_gate.set).start()
        (output,) = run(engine, [prompt], greedy(60))
        assert output.error is None
        assert output.token_ids == expected
        require_idle(engine)


def test_a_request_that_goes_while_it_waits_keeps_no_record_from_eviction(serve: Serve) -> None:
    """A method had looked ahead for it."""
    engine = make(serve, "layerwise", max_num_seqs=1)
    for name, prompt in (("runs", COLD), ("waits", PROMPT)):
        engine.add_request(prompt, greedy(NUM_TOKENS), request_id=name)
    engine.step()
    assert hierarchy_of(engine).tiers[0].index._holds
    engine.abort_all()
    assert len(engine.collect()) == 2
    engine.idle()
    require_idle(engine)


# -- tiers that say no ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_read_errors_open_the_breaker_and_it_closes_again(serve: Serve, require_right: Any, method: str) -> None:
    """F6, F16: on the engine's own clock."""
    clock = VirtualClock()
    engine = make(serve, method, clock=clock)
    tier, unruly = hierarchy_of(engine).tiers[0], rig(engine)
    unruly.outage = BROKEN
    for _ in range(4):
        require_right(ask(engine))
        engine.memory.cache.clear()
    assert tier.breaker.state is BreakerState.OPEN
    calls = unruly.num_reads
    output = ask(engine)
    require_right(output)
    assert unruly.num_reads == calls  # it is left alone
    assert "tier fault" in str(output.metrics.miss)
    assert faults(engine)["i/o error"] >= 3
    unruly.outage = None
    for _ in range(8):
        clock.advance(60.0)
        engine.step()
        assert hierarchy_of(engine).flush(WITHIN_S)
    assert tier.breaker.state is BreakerState.CLOSED
    leave_device(engine)
    output = ask(engine)
    require_right(output)
    assert output.attestation.tokens_loaded > 0
    require_idle(engine)


@pytest.mark.parametrize("kind", [FaultKind.FULL, FaultKind.IO_ERROR])
def test_writes_that_fail_cost_nothing_but_their_kv(serve: Serve, require_right: Any, kind: FaultKind) -> None:
    """F4, F7: what is not written is not found."""
    engine = serve("llama-tiny", "full+prefix+load", tiers=["memory(size=4MiB)"])
    unruly = rig(engine)
    unruly.refusal = Fault(kind, "the test says so")
    for _ in range(2):
        output = ask(engine)
        require_right(output)
        assert output.attestation.tokens_loaded == 0
        leave_device(engine)
    assert len(hierarchy_of(engine).tiers[0].index) == 0
    assert faults(engine)[str(kind)] >= BLOCKS
    unruly.refusal = None
    if kind is FaultKind.FULL:  # a full tier answers: it is used again at once
        store(engine, [PROMPT], greedy(NUM_TOKENS))
        assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS
    require_idle(engine)


def test_a_store_that_raises_is_a_tier_that_fails(serve: Serve, require_right: Any, caplog: Any) -> None:
    """Not what a store should do; still the request is computed, and nothing is held for ever."""
    clock = VirtualClock()
    engine = make(serve, "load", clock=clock)
    engine._runner._meter.engine = None
    unruly = rig(engine)

    def raises(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        raise OSError("out of the blue")

    unruly.alter = raises
    output = ask(engine)
    require_right(output)
    assert output.attestation.tokens_loaded == 0
    unruly.alter = None
    require_idle(engine)


def test_redis_dies_under_the_engine_and_comes_back(serve: Serve, require_right: Any) -> None:
    """F16."""
    server = RedisServer()
    try:
        clock = VirtualClock()
        engine = make(serve, "load", f"redis(size=4MiB, url={server.url})", clock=clock)
        tier = hierarchy_of(engine).tiers[0]
        require_right(ask(engine))
        leave_device(engine)
        server.kill()
        for _ in range(4):
            output = ask(engine)
            require_right(output)
            assert output.attestation.tokens_loaded == 0
            leave_device(engine)
        assert tier.breaker.state is not BreakerState.CLOSED
        server.start()  # empty
        for _ in range(8):
            clock.advance(60.0)
            engine.step()
            assert hierarchy_of(engine).flush(WITHIN_S)
            if tier.breaker.state is BreakerState.CLOSED:
                break
        assert tier.breaker.state is BreakerState.CLOSED
        for _ in range(2):  # the books say they are there, Redis says no: computed, and stored anew
            require_right(ask(engine))
            leave_device(engine)
        assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS
        require_idle(engine)
        engine.close()
    finally:
        server.close()


# -- requests that go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", range(7))
def test_abort_while_loading(serve: Serve, require_right: Any, method: str, num_steps: int) -> None:
    engine = make(serve, method)
    seen = set()
    for gone_first in (True, False):
        engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
        engine.add_request(OTHER, greedy(NUM_TOKENS), request_id="b")
        for _ in range(num_steps):
            engine.step()
        sequence = engine._requests.get("a")
        if sequence is not None:
            seen.add((sequence[0].phase, loads_of(engine).of(sequence[0]) is not None))
        first, second = ("a", "b") if gone_first else ("b", "a")
        engine.abort(first)
        engine.memory.cache.check()
        done = finish(engine)
        if done.get(second) is not None:
            require_right(done[second])
        require_idle(engine)
        engine.memory.cache.clear()
    if num_steps == 0:
        assert seen == {(Phase.WAITING, False)}
    if num_steps == 1 and method == "load":
        assert (Phase.PREFILL, True) in seen


@pytest.mark.parametrize("method", METHODS)
def test_abort_while_a_transfer_is_under_way(serve: Serve, require_right: Any, method: str) -> None:
    """Its blocks stay held until the transfer ends; nobody gets them before, and they are freed exactly once."""
    engine = make(serve, method, blocks=24)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    engine.abort("a")
    engine.memory.cache.check()
    usage = engine.memory.cache.usage()
    assert usage.num_sequences == 0
    assert usage.num_referenced == BLOCKS
    assert finish(engine)["a"].finish_reason is FinishReason.ABORT
    require_right(ask(engine, COLD))
    unruly.read_gate.set()
    require_idle(engine)
    require_right(ask(engine), ask(engine, OTHER))


@pytest.mark.parametrize("method", METHODS)
def test_preemption_while_loading(serve: Serve, require_right: Any, method: str) -> None:
    """An earlier request grows into the room of one whose blocks are on their way."""
    engine = make(serve, method, blocks=14)
    unruly = rig(engine)
    (early,) = prompts(40, seed=9)
    expected = run(serve("llama-tiny", "full"), [early], greedy(60))[0].token_ids
    engine._runner._meter.engine = None
    engine.add_request(early, greedy(60), request_id="early")
    engine.step()
    engine.step()
    unruly.read_gate.clear()
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
    done = step_until(engine, lambda: engine.stats().num_preemptions > 0)
    assert unruly.reading.is_set()
    check(engine)
    unruly.read_gate.set()
    done |= finish(engine)
    require_right(done["a"])
    assert done["early"].token_ids == expected
    if method == "load":  # the others computed it meanwhile, or grew themselves
        assert done["a"].metrics.num_preemptions > 0
    require_idle(engine)


@pytest.mark.parametrize("method", METHODS)
def test_close_while_loading(serve: Serve, method: str) -> None:
    engine = make(serve, method)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    threads = [t for t in threading.enumerate() if t.name == "kvwise-load"]
    engine.close()  # opens the gate when it closes the store
    for thread in threads:
        thread.join(WITHIN_S)
        assert not thread.is_alive()
    engine.memory.cache.check()
    assert engine.memory.cache.usage().num_sequences == 0
    engine.close()


# -- by layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_a_bad_layer_after_the_request_counts_on_it(serve: Serve, require_right: Any, layer: int) -> None:
    """It has computed on top of layers that came: all of that is thrown away, and it is computed from the start."""
    clock = VirtualClock()
    engine = serve("llama-tiny", "full+prefix+layerwise", tiers=["memory(size=4MiB)"], clock=clock,
                   meter=VirtualMeter(clock, lambda tokens, context: 1e-3 * tokens), max_num_seqs=4)  # fmt: skip
    store(engine, [PROMPT, OTHER], greedy(NUM_TOKENS))
    unruly, seen = rig(engine), dict[bytes, int]()
    joined: list[bool] = []

    def alter(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        if isinstance(view, Fault) or len(view) < 1024:  # a header
            return view
        seen[extent.key] = seen.get(extent.key, -1) + 1
        if seen[extent.key] != layer:
            return view
        if layer:  # wait until the request has joined
            (found,) = list(loads_of(engine)._loads.values()) or [None]
            if found is not None:
                with found.news:
                    while not found.joined:
                        found.news.wait(0.001)
                joined.append(True)
        return flipped(7)(extent, view)

    unruly.alter = alter
    output = ask(engine)
    require_right(output)
    assert any(joined) == bool(layer)
    assert output.attestation.tokens_loaded == 0
    assert output.metrics.num_cached_tokens == 0
    assert "corrupt" in str(output.metrics.miss)
    unruly.alter = None
    require_idle(engine)
    require_right(ask(engine, OTHER))


def test_a_layer_that_is_late_after_the_request_counts_on_it(serve: Serve, require_right: Any) -> None:
    clock = VirtualClock()
    engine = serve("llama-tiny", "full+prefix+layerwise", tiers=["memory(size=4MiB)"], clock=clock,
                   meter=VirtualMeter(clock, lambda tokens, context: 1e-3 * tokens), tier_deadline_s=0.05)  # fmt: skip
    store(engine, [PROMPT, OTHER], greedy(NUM_TOKENS))
    unruly = rig(engine)

    def alter(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        if unruly.num_reads == 4:  # after the headers and two layers
            unruly._pass(unruly.read_gate, unruly.reading)
        return view

    unruly.alter = alter
    engine.add_request(PROMPT, greedy(NUM_TOKENS), request_id="a")
    engine.step()
    unruly.read_gate.clear() if unruly.num_reads < 2 else None
    done = finish(engine)
    unruly.read_gate.set()
    require_right(done["a"])
    require_idle(engine)


# -- numbers that are none ------------------------------------------------------------------------------------------

POISON = 300


@pytest.mark.parametrize("offload", ["through", "back"])
def test_kv_that_is_no_number_is_not_stored(serve: Serve, offload: str) -> None:
    """F30: below the device as on it."""
    loaded = load_model("random:llama-tiny")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[POISON] = float("nan")
    engine = serve(
        loaded, "full+prefix+load", tiers=["memory(size=4MiB)"], offload=offload, max_num_batched_tokens=32,
        max_num_seqs=4,
    )  # fmt: skip
    sick = [*PROMPT[:70], POISON, *PROMPT[71:]]
    (output,) = run(engine, [sick], greedy(NUM_TOKENS))
    assert output.finish_reason is FinishReason.ERROR
    assert hierarchy_of(engine).flush()
    entries = list(hierarchy_of(engine).tiers[0].index.entries())
    assert len(entries) <= 4  # the blocks before the sick one
    engine.memory.cache.clear()
    (healthy,) = run(engine, [PROMPT], greedy(NUM_TOKENS))
    assert healthy.error is None
    assert healthy.attestation.tokens_loaded == 16 * len(entries)
    assert healthy.token_ids == ask(serve("llama-tiny", "full")).token_ids
    require_idle(engine)


def test_loads_on_a_virtual_clock_survive_faults_too(serve: Serve, require_right: Any) -> None:
    clock = VirtualClock()
    engine = serve("llama-tiny", "full+prefix+cake(chunk=32)", tiers=["memory(size=4MiB)"], clock=clock,
                   meter=VirtualMeter(clock, lambda tokens, context: 1e-3 * tokens), max_num_batched_tokens=32,
                   max_num_seqs=4)  # fmt: skip
    loads = loads_of(engine)
    loads.driver = VirtualDriver(clock, lambda tier, num_bytes: num_bytes / 2e6, loads.hierarchy.rates)
    store(engine, [PROMPT, OTHER], greedy(NUM_TOKENS))
    rig(engine).alter = only(BLOCKS - 2, engine, flipped(-1))
    require_right(*run(engine, [PROMPT, OTHER], greedy(NUM_TOKENS)))
    assert isinstance(hierarchy_of(engine).tiers[0].store, Unruly)
    require_idle(engine)


# -- methods that raise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decide", "next_chunk", "may_compute"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loading_method_that_raises_costs_its_load_only(
    serve: Serve, require_right: Any, monkeypatch: pytest.MonkeyPatch, method: str, where: str
) -> None:
    """F29."""
    engine = make(serve, method)
    kind, calls = type(loads_of(engine).method), []
    original = getattr(kind, where)

    def bad(self: Any, outlook: Any, *rest: Any) -> Any:
        if outlook.stop == BLOCKS:
            calls.append(1)
            if len(calls) > (where == "next_chunk"):
                raise RuntimeError("the method is broken")
        return original(self, outlook, *rest)

    monkeypatch.setattr(kind, where, bad)
    unruly = rig(engine)
    unruly.read_gate.clear()
    engine._runner._meter.engine = None
    names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in (OTHER, PROMPT)]
    done = step_until(engine, lambda: bool(calls) or where == "next_chunk")
    unruly.read_gate.set()
    done |= finish(engine)
    assert calls
    require_right(*(done[name] for name in names))
    require_idle(engine)
