"""LLM: prompts in, outputs out, in order; text or tokens; and nothing left behind."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvwise import LLM, SamplingParams, UsageError, parse
from kvwise.core.output import FinishReason
from tests.engine.runs import require_empty

Load = Callable[[str], Any]


@pytest.fixture
def llm(load: Load) -> Any:
    with LLM(load("llama-tiny"), kv_cache_memory_bytes=2**21, check=True) as llm:
        yield llm


def test_outputs_are_in_the_order_of_prompts_and_samples(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, n=samples, ignore_eos=True) for n, samples in ((9, 1), (2, 3), (5, 1))]
    outputs = llm.generate(["first", "second", "third"], params)
    assert [len(o.token_ids) for o in outputs] == [9, 2, 2, 2, 5]
    assert [o.index for o in outputs] == [0, 0, 1, 2, 0]
    assert all(o.finished for o in outputs)
    require_empty(llm.engine)


def test_text_tokens_and_single_prompts_are_the_same(llm: LLM) -> None:
    tokens = llm.engine.loaded.tokenizer.encode("hello there")
    one, two, three, four = (llm.generate(p)[0].token_ids for p in ("hello there", ["hello there"], tokens, [tokens]))
    assert one == two == three == four
    assert llm.generate([]) == []


def test_the_default_strategy_shares_prefixes(llm: LLM) -> None:
    assert llm.engine.strategy == parse("prefix")
    text = "The same long beginning of a prompt, said twice. "
    assert [llm.generate(text)[0].metrics.num_cached_tokens for _ in range(2)] == [0, 48]


def test_streaming_and_giving_up(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    whole = llm.generate("stream me", params)[0]
    pieces = [output.new_token_ids for output in llm.stream("stream me", params)]
    assert [t for piece in pieces for t in piece] == whole.token_ids
    assert len(pieces) == 8
    stream = llm.stream("stream me", params)
    next(stream)
    stream.close()
    require_empty(llm.engine)
    assert llm.generate("stream me", params)[0].token_ids == whole.token_ids


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(UsageError, match="empty"):
        llm.generate([[1, 2, 3], []])
    assert not llm.engine.has_unfinished()
    require_empty(llm.engine)
    with pytest.raises(UsageError, match="2 sampling params for 1 prompts"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.engine._runner.run
    calls = []

    def interrupted(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(llm.engine._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"], SamplingParams(max_tokens=9, ignore_eos=True))
    require_empty(llm.engine)
    assert llm.generate("three")[0].finish_reason is not FinishReason.ABORT


def test_the_model_is_as_it_was_when_the_engine_has_closed(load: Load) -> None:
    loaded = load("llama-tiny")
    with LLM(loaded, "infinigen", kv_cache_memory_bytes=2**21) as llm:
        llm.generate("some text")
        assert any(layer.module._forward_pre_hooks for layer in loaded.layers)
    assert not any(layer.module._forward_pre_hooks for layer in loaded.layers)


def test_unknown_settings_are_refused(load: Load) -> None:
    with pytest.raises(TypeError, match="max_num_sequences"):
        LLM(load("llama-tiny"), max_num_sequences=3)


@pytest.mark.parametrize("module", ["kvwise", "kvwise.core", "kvwise.cache", "kvwise.cache.manager"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_all_there() -> None:
    import kvwise

    assert all(getattr(kvwise, name) is not None for name in kvwise.__all__)
    assert set(kvwise.__all__) < set(dir(kvwise))
    with pytest.raises(AttributeError, match="no attribute 'Foo'"):
        _ = kvwise.Foo


def test_streams_side_by_side_each_get_their_own(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    alone = [llm.generate(text, params)[0].token_ids for text in ("first", "second one")]
    streams = [llm.stream(text, params) for text in ("first", "second one")]
    pieces: list[list[int]] = [[], []]
    for outputs in zip(*streams, strict=True):
        for piece, output in zip(pieces, outputs, strict=True):
            piece += output.new_token_ids
    assert pieces == alone


def test_a_blocked_request_does_not_inflate_the_hit_rate(load: Load) -> None:
    with LLM(load("3m"), kv_cache_memory_bytes=40 * 49152, check=True) as llm:
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        prompts = [[i, *range(300)] for i in range(4)]
        llm.generate(prompts, params)
        assert llm.engine.stats().num_preemptions == 0
        assert llm.engine.stats().prefix_queries == sum(map(len, prompts))
