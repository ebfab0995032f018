"""What must not go wrong: aborts in any phase, methods that raise, numbers that are no numbers, requests too large."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import CapacityError, UsageError
from kvwise.core.output import FinishReason
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.retention.base import DecodeView, Kept, PromptView
from kvwise.methods.retention.h2o import H2O
from kvwise.methods.selection.infinigen import InfiniGenIndex
from kvwise.models.load import load_model
from kvwise.tiers.link import Link
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of

Serve = Callable[..., Any]
# Of these, answers do not depend on what is cached ("infinigen+prefix" sees the queries of computed rows only).
STRATEGIES = ("full", "prefix", "streaming+prefix", "h2o", "infinigen")


# -- aborts -----------------------------------------------------------------------------------------------------


def require_free(engine: Engine) -> None:
    """Right after an abort, before any step: nothing is held on any tier, and the count is exact."""
    require_empty(engine)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


@pytest.mark.parametrize("strategy", [*STRATEGIES, "infinigen+prefix"])
@pytest.mark.parametrize("num_steps", [0, 1, 3, 4, 7])  # waiting, mid-prefill, end of prefill, decoding, later
def test_abort_frees_everything_within_the_call(serve: Serve, strategy: str, num_steps: int) -> None:
    engine = serve("llama-tiny", strategy, max_num_batched_tokens=16, max_num_seqs=4)
    (prompt,) = prompts(60)
    engine.add_request(prompt, greedy(20), request_id="a")
    for _ in range(num_steps):
        engine.step()
    sequence = sequence_of(engine, "a")
    expected = {0: Phase.WAITING, 1: Phase.PREFILL, 3: Phase.PREFILL}.get(num_steps, Phase.DECODE)
    assert sequence.phase is expected
    assert sequence.settled == (expected is Phase.DECODE and engine.memory.placement.settles)
    engine.abort("a")
    require_free(engine)
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.ABORT
    assert not engine.has_unfinished()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_an_abort_leaves_behind_disturbs_nobody(serve: Serve, strategy: str) -> None:
    many = prompts(60, 45, 50, 30)
    clean = serve("llama-tiny", strategy)
    expected = run(clean, many[1:], greedy(8))[1:]
    engine = serve("llama-tiny", strategy, max_num_batched_tokens=32, max_num_seqs=4)
    names = [engine.add_request(p, greedy(8)) for p in many]
    for gone in names[:2]:
        engine.step()
        engine.abort(gone)
    done = finish(engine)
    assert [done[n].token_ids for n in names[2:]] == [o.token_ids for o in expected]
    require_empty(engine)


def test_abort_of_a_preempted_request(serve: Serve) -> None:
    engine = serve("llama-tiny", "full", blocks=4, max_num_seqs=2)
    for name, prompt in zip("ab", prompts(20, 20), strict=True):
        engine.add_request(prompt, greedy(30), request_id=name)
    while not engine.stats().num_preemptions:
        engine.step()
    engine.abort("b")
    assert len(finish(engine)["a"].token_ids) == 30
    require_empty(engine)


def test_abort_takes_all_samples(serve: Serve) -> None:
    for num_steps in (0, 1, 2):
        engine = serve("llama-tiny", "prefix", max_num_seqs=3, max_num_batched_tokens=64)
        engine.add_request(prompts(40)[0], SamplingParams(n=5, temperature=1.0, max_tokens=20), request_id="a")
        for _ in range(num_steps):
            engine.step()
        engine.abort("a")
        require_free(engine)
        assert sum(o.finished for o in engine.step()) == 5


def test_abort_of_somebody_unknown_or_gone_is_no_error(serve: Serve) -> None:
    engine = serve("llama-tiny")
    engine.abort("nobody")
    engine.add_request([1, 2], greedy(1), request_id="a")
    finish(engine)
    engine.abort("a")
    require_free(engine)


def test_abort_while_the_copy_to_the_host_is_under_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("llama-tiny", "infinigen", max_num_batched_tokens=32, max_num_seqs=4)
    tiers = engine.memory.placement._tiers
    gate, began = threading.Event(), threading.Event()
    copy = tiers._copy_to_host

    def slow(source: Tensor, target: Tensor) -> None:
        began.set()
        gate.wait(10)
        copy(source, target)

    monkeypatch.setattr(tiers, "_copy_to_host", slow)
    engine.add_request(prompts(60)[0], greedy(5), request_id="a")
    engine.step()
    assert began.wait(10)  # the link's thread is reading the request's device blocks
    threading.Timer(0.01, gate.set).start()
    engine.abort("a")
    assert gate.is_set()  # the blocks were not given back under the copy
    require_free(engine)


def test_a_copy_to_the_host_that_fails_ends_its_request_only(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("llama-tiny", "infinigen", max_num_batched_tokens=64, max_num_seqs=4)
    first, second = prompts(40, 41)
    expected = run(engine, [second], greedy(5))[0].token_ids
    tiers = engine.memory.placement._tiers
    copy, calls = tiers._copy_to_host, []

    def fail_once(source: Tensor, target: Tensor) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no host memory")
        copy(source, target)

    monkeypatch.setattr(tiers, "_copy_to_host", fail_once)
    failed, fine = run(engine, [first, second], greedy(5))
    assert failed.finish_reason is FinishReason.ERROR
    assert "no host memory" in failed.error
    assert fine.token_ids == expected
    require_empty(engine)


def test_abort_from_within_observe(serve: Serve) -> None:
    """The caller may give up a request, also another one, while it looks at the logits."""
    for strategy in STRATEGIES:
        engine = serve("llama-tiny", strategy)
        a, b, c = prompts(20, 21, 22)

        def stop(index: int, step: int, logits: Tensor, engine: Engine = engine) -> None:
            if step == 2:
                engine.abort("b")
                engine.abort("c")

        engine.add_request(a, greedy(5), request_id="a")
        engine.add_request(b, greedy(5), request_id="b", observe=stop)
        engine.add_request(c, greedy(5), request_id="c")
        done = finish(engine)
        assert len(done["a"].token_ids) == 5
        assert done["b"].finish_reason is done["c"].finish_reason is FinishReason.ABORT
        assert len(done["b"].token_ids) == len(done["c"].token_ids) == 2
        require_empty(engine)


def test_close_ends_what_runs(serve: Serve) -> None:
    for strategy in STRATEGIES:
        engine = serve("llama-tiny", strategy, max_num_batched_tokens=32, max_num_seqs=4)
        for prompt in prompts(60, 20):
            engine.add_request(prompt, greedy(9))
        engine.step()
        engine.step()
        engine.close()
        require_free(engine)
        assert not engine.has_unfinished()
        engine.close()


# -- methods that raise -----------------------------------------------------------------------------------------

BAD = 44  # prompt length on which the methods below fail
LENGTHS = (30, BAD, 52)


def check_only_the_bad_one_fails(engine: Engine, expected: list[list[int]], error: str) -> None:
    outputs = run(engine, prompts(*LENGTHS), greedy(8))
    bad = outputs.pop(1)
    assert bad.finish_reason is FinishReason.ERROR
    assert error in bad.error
    assert [o.token_ids for o in outputs] == [expected[0], expected[2]]
    require_empty(engine)


@pytest.fixture
def expected(serve: Serve) -> Callable[[str], list[list[int]]]:
    return lambda strategy: [o.token_ids for o in run(serve("llama-tiny", strategy), prompts(*LENGTHS), greedy(8))]


def test_keep_that_raises(serve: Serve, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = expected("h2o")
    keep = H2O.keep

    def bad(self: H2O, view: PromptView) -> Kept:
        if view.num_tokens == BAD:
            raise RuntimeError("keep is broken")
        return keep(self, view)

    monkeypatch.setattr(H2O, "keep", bad)
    check_only_the_bad_one_fails(serve("llama-tiny", "h2o"), tokens, "RuntimeError: keep is broken")


WRONG_MASKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "too many": (torch.ones_like, "ValueError: h2o kept"),
    "nothing": (torch.zeros_like, "ValueError: h2o kept nothing"),
    "shape": (lambda mask: mask[..., :-1], "ValueError: h2o told what stays as"),
    "dtype": (lambda mask: mask.int(), "ValueError: h2o told what stays as"),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_keep_that_answers_nonsense(serve: Serve, expected: Any, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    tokens = expected("h2o")
    keep = H2O.keep
    spoil, message = WRONG_MASKS[wrong]

    def bad(self: H2O, view: PromptView) -> Kept:
        kept = keep(self, view)
        return kept if view.num_tokens != BAD else replace(kept, mask=spoil(kept.mask))

    monkeypatch.setattr(H2O, "keep", bad)
    check_only_the_bad_one_fails(serve("llama-tiny", "h2o"), tokens, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raises", "RuntimeError: worth is broken"),
        ("shape", "ValueError: h2o told the worth of slots as"),
        ("lets nobody go", "ValueError: h2o lets no token go"),
        ("no numbers", "ValueError: h2o lets no token go"),
    ],
)
def test_worth_that_fails(
    serve: Serve, expected: Any, monkeypatch: pytest.MonkeyPatch, wrong: str, message: str
) -> None:
    """Worth is asked for the whole batch; only the request that cannot be served ends."""
    tokens = expected("h2o")
    worth = H2O.worth

    def bad(self: H2O, view: DecodeView) -> Tensor:
        found = worth(self, view)
        is_bad = (view.num_tokens >= BAD + 3) & (view.num_tokens < 50) & (view.limit[:, 0, 0] == int(BAD * 0.2))
        if not bool(is_bad.any()):
            return found
        if wrong == "raises":
            raise RuntimeError("worth is broken")
        if wrong == "shape":
            return found[:, :-1]
        nonsense = torch.inf if wrong == "lets nobody go" else torch.nan
        return torch.where(is_bad[:, None, None, None], nonsense, found)

    monkeypatch.setattr(H2O, "worth", bad)
    monkeypatch.setattr(H2O, "ranks_by_mass", False)  # as of a class with a worth of its own
    check_only_the_bad_one_fails(serve("llama-tiny", "h2o"), tokens, message)


@pytest.mark.parametrize("where", ["observe", "build", "add", "choose", "nonsense"])
def test_index_that_fails(serve: Serve, expected: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    tokens = expected("infinigen")
    name = "choose" if where == "nonsense" else where
    original = getattr(InfiniGenIndex, name)
    build, bad_rows = InfiniGenIndex.build, set()

    def note(self: InfiniGenIndex, layer: int, row: int, keys: Tensor) -> None:
        (bad_rows.add if len(keys) == BAD else bad_rows.discard)(row)
        if where == "build" and row in bad_rows:
            raise RuntimeError("build is broken")
        build(self, layer, row, keys)

    def bad(self: InfiniGenIndex, layer: int, row: int, *rest: Any) -> Any:
        if (where == "observe" and rest[0].shape[0] == BAD) or (where != "observe" and row in bad_rows and layer == 2):
            if where != "nonsense":
                raise RuntimeError(f"{where} is broken")
            return original(self, layer, row, *rest) + 10_000
        return original(self, layer, row, *rest)

    monkeypatch.setattr(InfiniGenIndex, name, bad)
    monkeypatch.setattr(InfiniGenIndex, "build", note)
    message = "named tokens that the request does not have" if where == "nonsense" else f"{where} is broken"
    check_only_the_bad_one_fails(serve("llama-tiny", "infinigen"), tokens, message)


def test_observe_of_the_caller_that_raises(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix")
    first, second = prompts(20, 30)

    def bad(index: int, step: int, logits: Tensor) -> None:
        if step == 1:
            raise RuntimeError("observe is broken")

    engine.add_request(first, greedy(4), request_id="a", observe=bad)
    engine.add_request(second, greedy(4), request_id="b")
    done = finish(engine)
    assert done["a"].error == "RuntimeError: observe is broken"
    assert len(done["a"].token_ids) == 1
    assert len(done["b"].token_ids) == 4
    require_empty(engine)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forward_pass_that_raises_ends_its_requests_and_not_the_engine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    engine = serve("llama-tiny", strategy, max_num_seqs=2, max_num_batched_tokens=64)
    many = prompts(40, 41, 42)
    expected = [o.token_ids for o in run(engine, many, greedy(5))]
    for failing in (1, 2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", _fails_at(failing, engine._runner.run))
            outputs = run(engine, many, greedy(5))
        assert ["no memory" in (o.error or "") for o in outputs] == [True, True, False]
        assert outputs[2].token_ids == expected[2]
        require_empty(engine)
        assert [o.token_ids for o in run(engine, many, greedy(5))] == expected


def _fails_at(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def run_batch(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            original(batch)  # as far as it comes
            raise MemoryError("no memory")
        return original(batch)

    return run_batch


# -- numbers that are none --------------------------------------------------------------------------------------

POISON = 300  # an id that text never has


@pytest.fixture(params=[float("nan"), float("inf")], ids=["nan", "inf"])
def poisoned(request: pytest.FixtureRequest) -> Any:
    """A model whose embedding of one token is no number."""
    loaded = load_model("random:llama-tiny")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[POISON] = request.param
    return loaded


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_number_in_kv_fails_its_request_and_nothing_of_it_is_cached(
    serve: Serve, poisoned: Any, strategy: str
) -> None:
    many = prompts(50, 70, 40)
    expected = [o.token_ids for o in run(serve("llama-tiny", strategy), many, greedy(6))]
    engine = serve(poisoned, strategy, max_num_batched_tokens=32, max_num_seqs=4)
    sick = [*many[1][:36], POISON, *many[1][37:]]  # in the third block, far from the row that is sampled
    for _ in range(2):
        first, failed, last = run(engine, [many[0], sick, many[2]], greedy(6))
        assert failed.finish_reason is FinishReason.ERROR
        assert "not finite" in failed.error
        assert failed.token_ids == []
        assert [first.token_ids, last.token_ids] == [expected[0], expected[2]]
        require_empty(engine)
    # What is before the sick token is sound and may be shared; the healthy prompt is answered right.
    (healthy,) = run(engine, [many[1]], greedy(6))
    assert healthy.token_ids == expected[1]
    assert healthy.metrics.num_cached_tokens <= 32


def test_no_number_while_decoding(serve: Serve, poisoned: Any) -> None:
    many = prompts(20, 21)
    for strategy in STRATEGIES:
        engine = serve(poisoned, strategy)
        forced = greedy(6, forced_tokens=[1, 2, POISON, 3, 4, 5])
        failed, fine = run(engine, many, [forced, greedy(6)])
        assert failed.finish_reason is FinishReason.ERROR
        assert failed.token_ids == [1, 2, POISON]
        assert len(fine.token_ids) == 6
        require_empty(engine)


# -- requests that cannot be --------------------------------------------------------------------------------------


def test_requests_too_large_are_refused_at_once(serve: Serve) -> None:
    block = 2 * 16 * 16 * 4 * 4 * 2
    cases = [
        (serve("llama-tiny", "full", blocks=4), 60, 5, r"65 tokens need 5 blocks.*at most 4.*raise kv_cache_memory"),
        (serve("llama-tiny", max_model_len=50), 45, 6, r"45 tokens and max_tokens=6 make 51.*max_model_len=50.*lower"),
        (serve("llama-tiny", "h2o", blocks=5), 65, 1, r"65 tokens need 5 blocks.*raise kv_cache_memory_bytes"),
        (serve("llama-tiny", "streaming(window=90)", blocks=4), 30, 80, r"window=90.* 95 tokens.*holds 48.*raise"),
        (serve("llama-tiny", "infinigen", kv_offloading_bytes=3 * block), 40, 9, r"need 49 tokens.*host.*48.*raise"),
        (serve("llama-tiny", "infinigen", blocks=1), 10, 60, r"70 tokens of device KV.*raise kv_cache_memory_bytes"),
    ]
    for engine, num_prompt, num_tokens, message in cases:
        with pytest.raises(CapacityError, match=message) as caught:
            engine.add_request(prompts(num_prompt)[0], greedy(num_tokens))
        assert "\n" not in str(caught.value)
        assert not engine.has_unfinished()
        require_free(engine)


def test_the_largest_request_that_is_accepted_is_served(serve: Serve) -> None:
    block = 2 * 16 * 16 * 4 * 4 * 2
    cases = [
        (serve("llama-tiny", "full", blocks=4), 60, 4),
        (serve("llama-tiny", max_model_len=50), 45, 5),
        (serve("llama-tiny", "h2o", blocks=5), 64, 60),
        (serve("llama-tiny", "streaming(window=57)", blocks=5), 30, 90),
        (serve("llama-tiny", "infinigen", kv_offloading_bytes=3 * block), 40, 8),
        (serve("llama-tiny", "infinigen", blocks=1), 10, 54),
    ]
    for engine, num_prompt, num_tokens in cases:
        (output,) = run(engine, prompts(num_prompt), greedy(num_tokens))
        assert output.error is None
        assert len(output.token_ids) == num_tokens
        require_empty(engine)


def test_requests_that_make_no_sense(serve: Serve) -> None:
    engine = serve("llama-tiny")
    engine.add_request([1], greedy(1), request_id="a")
    for prompt, params, more, message in [
        ([], greedy(1), {}, "prompt is empty"),
        ([1, 320], greedy(1), {}, "token id 320 is outside the vocabulary of 320"),
        ([-1], greedy(1), {}, "token id -1"),
        ([1], greedy(1), {"request_id": "a"}, "'a' is in use"),
        ([1], [], {}, "at least one"),
        ([1], [greedy(1), greedy(1, n=2)], {}, "all with n=1"),
        ([1], [greedy(1), greedy(1, forced_tokens=[320])], {}, "id 320 is outside the vocabulary of 320"),
        ([1], greedy(1, forced_tokens=[999]), {}, "forced_tokens"),
        ([1], greedy(1, stop_token_ids=(320,)), {}, "token id 320"),
    ]:
        with pytest.raises(UsageError, match=message):
            engine.add_request(prompt, params, **more)
    assert list(finish(engine)) == ["a"]


def test_a_full_host_tier_makes_requests_wait_their_turn(serve: Serve) -> None:
    block = 2 * 16 * 16 * 4 * 4 * 2
    many = prompts(60, 60, 60, 60)
    expected = [o.token_ids for o in run(serve("llama-tiny", "infinigen"), many, greedy(12))]
    engine = serve("llama-tiny", "infinigen", blocks=200, kv_offloading_bytes=10 * block)
    outputs = run(engine, many, greedy(12))
    assert [o.token_ids for o in outputs] == expected
    assert engine.stats().num_preemptions <= 2  # two fit at a time; the others are not computed over and over
    assert sum(o.attestation.tokens_computed for o in outputs) < 2 * sum(len(p) + 12 for p in many)
    require_empty(engine)


def test_links_that_do_not_exist_are_refused(serve: Serve) -> None:
    with pytest.raises(UsageError, match=r"no link is called 'disk:host'; links: host:device, device:host"):
        serve("llama-tiny", "infinigen", links={"disk:host": 1e9})


def test_a_pool_of_less_than_a_block_is_refused(serve: Serve) -> None:
    with pytest.raises(CapacityError, match=r"less than one block.*raise kv_cache_memory_bytes"):
        serve("llama-tiny", kv_cache_memory_bytes=100)
    with pytest.raises(CapacityError, match="kv_offloading_bytes=100 is less than one block"):
        serve("llama-tiny", "infinigen", kv_offloading_bytes=100)


def test_link_threads_end_with_the_engine(serve: Serve) -> None:
    engine = serve("llama-tiny", "infinigen")
    run(engine, prompts(20), greedy(3))
    tiers = engine.memory.placement._tiers
    mine: list[Link] = [tiers._fetch_link, tiers._store_link]
    threads = [t for link in mine for t in link._worker._threads]
    assert any(t.is_alive() for t in threads)
    engine.close()
    assert not any(t.is_alive() for t in threads)
