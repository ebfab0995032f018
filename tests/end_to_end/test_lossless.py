"""Lossless means equal: greedy tokens are those of transformers' `generate` in float32, however they are served."""

from collections.abc import Callable
from typing import Any

import pytest

from kvwise.core.params import SamplingParams
from kvwise.models.support import ARCHITECTURES
from tests.engine.plain import Plain
from tests.engine.runs import greedy, prompts, require_empty, run

Serve = Callable[..., Any]
Reference = Callable[[str], Plain]

RAGGED = (1, 3, 15, 16, 17, 33, 48, 70)  # below, at and above a block and the tiny models' window of 8
NUM_TOKENS = 10
CHUNKED = {"max_num_batched_tokens": 9, "max_num_seqs": 8}
UNCHUNKED = {"enable_chunked_prefill": False}


def check(plain: Plain, many: list[list[int]], outputs: list[Any], num_tokens: int = NUM_TOKENS) -> None:
    for prompt, output in zip(many, outputs, strict=True):
        assert output.error is None
        plain.answer(prompt, num_tokens).require(output.token_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
def test_batch_of_ragged_prompts(serve: Serve, plain: Reference, architecture: str, settings: dict[str, Any]) -> None:
    engine = serve(f"{architecture}-tiny", "full", **settings)
    many = prompts(*RAGGED)
    check(plain(architecture), many, run(engine, many, greedy(NUM_TOKENS)))
    require_empty(engine)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
def test_one_prompt_alone(serve: Serve, plain: Reference, architecture: str, settings: dict[str, Any]) -> None:
    engine = serve(f"{architecture}-tiny", "full", **settings)
    for prompt in prompts(*RAGGED)[-2:]:
        check(plain(architecture), [prompt], run(engine, [prompt], greedy(NUM_TOKENS)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
def test_with_prefix_hits(serve: Serve, plain: Reference, architecture: str, settings: dict[str, Any]) -> None:
    engine = serve(f"{architecture}-tiny", "prefix", **settings)
    shared, *tails = prompts(40, 1, 9, 24, 40)
    first = [shared + tail for tail in tails[:2]]
    check(plain(architecture), first, run(engine, first, greedy(NUM_TOKENS)))
    second = [shared + tail for tail in tails] + [shared, shared[:32]]
    outputs = run(engine, second, greedy(NUM_TOKENS))
    check(plain(architecture), second, outputs)
    # The first two were computed before: all their full blocks are there. A prompt of whole blocks computes one.
    assert [o.metrics.num_cached_tokens for o in outputs] == [32, 48, 32, 32, 32, 16]
    require_empty(engine)


@pytest.mark.parametrize("strategy", ["full", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_preemption(serve: Serve, plain: Reference, architecture: str, strategy: str) -> None:
    engine = serve(f"{architecture}-tiny", strategy, blocks=9, max_num_seqs=4)
    many = prompts(15, 17, 33, 31)
    outputs = run(engine, many, greedy(30))
    assert engine.stats().num_preemptions > 0
    assert sum(o.metrics.num_preemptions for o in outputs) == engine.stats().num_preemptions
    check(plain(architecture), many, outputs, 30)
    require_empty(engine)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("strategy", ["full", "prefix", "streaming(window=4096)"])
def test_every_sample_is_what_it_is_alone(serve: Serve, architecture: str, strategy: str) -> None:
    (prompt,) = prompts(37)
    asked = {"temperature": 1.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    engine = serve(f"{architecture}-tiny", strategy, max_num_batched_tokens=64)
    engine.add_request(prompt, SamplingParams(n=4, **asked), request_id="four")
    forked = _by_index(engine)
    assert len({tuple(tokens) for tokens in forked.values()}) == 4  # the samples differ
    # One sequence at a time: no sample can fork, each computes the whole prompt by itself.
    alone = serve(f"{architecture}-tiny", strategy, max_num_seqs=1)
    alone.add_request(prompt, SamplingParams(n=4, **asked), request_id="four")
    assert _by_index(alone) == forked
    assert _first_sample(alone, prompt, asked) == forked[0]


def _by_index(engine: Any) -> dict[int, list[int]]:
    found = {}
    while engine.has_unfinished():
        found |= {o.index: o.token_ids for o in engine.step() if o.finished}
    return found


def _first_sample(engine: Any, prompt: list[int], asked: dict[str, Any]) -> list[int]:
    return run(engine, [prompt], SamplingParams(**asked))[0].token_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_h2o_that_keeps_all(serve: Serve, plain: Reference, architecture: str) -> None:
    engine = serve(f"{architecture}-tiny", "h2o(budget=1)", **CHUNKED)
    many = prompts(*RAGGED)
    check(plain(architecture), many, run(engine, many, greedy(NUM_TOKENS)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streaming_whose_window_is_never_full(serve: Serve, plain: Reference, architecture: str) -> None:
    """Pages per layer and head hold all there is: the answer is that of whole blocks."""
    engine = serve(f"{architecture}-tiny", "streaming(window=100)+prefix", **CHUNKED)
    many = prompts(*RAGGED)
    check(plain(architecture), many, run(engine, many, greedy(NUM_TOKENS)))
    require_empty(engine)


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("reuse", ["", "+prefix"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "opt", "gpt2", "gpt_neox"])
def test_infinigen_that_fetches_all(
    serve: Serve, plain: Reference, architecture: str, reuse: str, settings: dict[str, Any]
) -> None:
    strategy = f"infinigen(alpha=1e9, budget=1, ratio=1){reuse}"
    engine = serve(f"{architecture}-tiny", strategy, **settings)
    many = prompts(*RAGGED)
    for _ in range(2):
        check(plain(architecture), many, run(engine, many, greedy(NUM_TOKENS)))
    require_empty(engine)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_infinigen_after_preemption(serve: Serve, plain: Reference, architecture: str) -> None:
    strategy = "infinigen(alpha=1e9, budget=1, ratio=1)"
    block_bytes = 2 * 16 * 16 * 4 * 4 * (4 if architecture == "gpt2" else 2)
    engine = serve(f"{architecture}-tiny", strategy, blocks=64, max_num_seqs=4, kv_offloading_bytes=9 * block_bytes)
    many = prompts(15, 17, 33, 31)
    outputs = run(engine, many, greedy(30))
    assert engine.stats().num_preemptions > 0
    check(plain(architecture), many, outputs, 30)
    require_empty(engine)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neo"])
def test_kernels_of_every_family_agree(serve: Serve, plain: Reference, architecture: str) -> None:
    many = prompts(*RAGGED)
    engine = serve(f"{architecture}-tiny", "full", kernels="reference", **CHUNKED)
    check(plain(architecture), many, run(engine, many, greedy(NUM_TOKENS)))
