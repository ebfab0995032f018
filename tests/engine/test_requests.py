"""What a request may ask: when it ends, what it is told, and that its tokens depend on nothing but itself."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.core.output import FinishReason
from kvwise.core.params import SamplingParams
from kvwise.models.text import EOS
from tests.engine.runs import finish, greedy, prompts, require_empty, run

Serve = Callable[..., Any]
ALWAYS_EOS = {EOS: 1000.0}


def test_end_of_sequence_token(serve: Serve) -> None:
    engine = serve("llama-tiny")
    asked = [
        SamplingParams(max_tokens=6, logit_bias=ALWAYS_EOS),
        SamplingParams(max_tokens=6, logit_bias=ALWAYS_EOS, ignore_eos=True),
        SamplingParams(max_tokens=6, logit_bias=ALWAYS_EOS, min_tokens=3),
        SamplingParams(max_tokens=6, min_tokens=6),
    ]
    outputs = run(engine, prompts(9, 9, 9, 9), asked)
    assert [len(o.token_ids) for o in outputs] == [1, 6, 4, 6]
    assert [o.finish_reason.value for o in outputs] == ["stop", "length", "stop", "length"]
    assert outputs[0].token_ids == [EOS]
    assert outputs[0].text == ""
    assert EOS not in outputs[2].token_ids[:3]


def test_stop_token_ids(serve: Serve) -> None:
    engine = serve("llama-tiny")
    (prompt,) = prompts(20)
    tokens = run(engine, [prompt], greedy(12))[0].token_ids
    stop = tokens[4]
    (output,) = run(engine, [prompt], greedy(12, stop_token_ids=(stop,)))
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    (later,) = run(engine, [prompt], greedy(12, stop_token_ids=(stop,), min_tokens=12))
    assert len(later.token_ids) == 12


def test_stop_strings_cut_the_text(serve: Serve) -> None:
    engine = serve("llama-tiny")
    (prompt,) = prompts(20)
    text = run(engine, [prompt], greedy(30))[0].text
    stop = text[9:12]
    (output,) = run(engine, [prompt], greedy(30, stop=(stop, "never there")))
    assert output.finish_reason is FinishReason.STOP
    assert output.text == text[: text.index(stop)]
    assert len(output.token_ids) < 30
    require_empty(engine)


def test_logprobs_are_those_of_the_raw_distribution(serve: Serve) -> None:
    engine = serve("llama-tiny")
    seen: list[Tensor] = []
    engine.add_request(
        prompts(20)[0],
        SamplingParams(max_tokens=5, temperature=0.7, seed=1, logprobs=3, ignore_eos=True),
        observe=lambda index, step, logits: seen.append(logits.clone()),
    )
    (output,) = finish(engine).values()
    assert [told.token_id for told in output.logprobs] == output.token_ids
    for told, logits in zip(output.logprobs, seen, strict=True):
        raw = logits.log_softmax(-1)
        assert told.logprob == pytest.approx(float(raw[told.token_id]), abs=1e-5)
        assert list(told.top) == raw.topk(3).indices.tolist()
        assert list(told.top.values()) == pytest.approx(raw.topk(3).values.tolist(), abs=1e-5)
    assert run(engine, prompts(20), greedy(3))[0].logprobs is None


def test_forced_tokens_are_followed_and_their_logits_observed(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix")
    (prompt,) = prompts(20)
    free = run(engine, [prompt], greedy(6))[0].token_ids
    forced = [*free[:3], 5, 6, 7]
    seen: dict[int, Tensor] = {}
    name = engine.add_request(
        prompt, greedy(6, forced_tokens=forced), observe=lambda index, step, row: seen.update({step: row})
    )
    assert finish(engine)[name].token_ids == forced
    assert list(seen) == [0, 1, 2, 3, 4, 5]
    assert [int(seen[i].argmax()) for i in range(4)] == free[:4]
    # What was forced is what the next token is computed from.
    (continued,) = run(engine, [prompt + forced[:5]], greedy(1, logprobs=0))
    assert continued.token_ids[0] == int(seen[5].argmax())


def test_an_output_begins_with_what_is_forced_and_goes_on_freely(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix")
    (prompt,) = prompts(20)
    (whole,) = run(engine, [[*prompt, 5, 6, 7]], greedy(4))
    (asked,) = run(engine, [prompt], greedy(7, forced_tokens=[5, 6, 7]))
    assert asked.token_ids == [5, 6, 7, *whole.token_ids]
    # A forced token ends nothing, though a sampled one of its kind would.
    (stopped,) = run(engine, [prompt], greedy(7, forced_tokens=[5, 6, 7], stop_token_ids=(6, whole.token_ids[0])))
    assert stopped.token_ids == [5, 6, 7, whole.token_ids[0]]
    # Nor does a stop string in what is given; only what is generated is searched.
    said = list(b"stop")
    (told,) = run(engine, [prompt], greedy(7, forced_tokens=said, stop=("stop",)))
    assert told.token_ids[:4] == said
    assert len(told.token_ids) == 7
    assert told.text.startswith("stop")
    with pytest.raises(UsageError, match=r"forced_tokens=.*at most max_tokens=2"):
        greedy(2, forced_tokens=[5, 6, 7])


@pytest.mark.parametrize("strategy", ["full", "prefix", "h2o(budget=0.3)", "streaming(budget=0.3)", "infinigen"])
def test_questions_asked_of_one_prompt_are_answered_as_if_each_were_alone(serve: Serve, strategy: str) -> None:
    (prompt,) = prompts(50)
    questions = [[3, 4], [5], [6, 7, 8]]
    params = [greedy(len(q) + 4, forced_tokens=q) for q in questions]
    alone = [run(serve("llama-tiny", strategy), [prompt], one)[0].token_ids for one in params]
    engine = serve("llama-tiny", strategy)
    seen: dict[tuple[int, int], int] = {}
    name = engine.add_request(prompt, params, observe=lambda i, step, row: seen.update({(i, step): int(row.argmax())}))
    outputs: dict[int, list[int]] = {}
    while engine.has_unfinished():
        outputs |= {o.index: o.token_ids for o in engine.step() if o.request_id == name}
    assert [outputs[i] for i in range(3)] == alone
    for i, question in enumerate(questions):
        assert [seen[i, step] for step in range(len(question), len(question) + 4)] == alone[i][len(question) :]
    require_empty(engine)


def test_a_seed_gives_its_tokens_whatever_else_runs(serve: Serve) -> None:
    asked = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    other = SamplingParams(max_tokens=20, temperature=1.2, top_k=20, ignore_eos=True)
    prompt, *others = prompts(30, 50, 20, 9, 33)
    (alone,) = run(serve("llama-tiny"), [prompt], asked)
    crowded = serve("llama-tiny", "prefix", blocks=14, max_num_batched_tokens=16, max_num_seqs=5)
    outputs = run(crowded, [*others, prompt], [*[other] * 4, asked])
    assert crowded.stats().num_preemptions > 0
    assert outputs[-1].token_ids == alone.token_ids
    assert outputs[-1].text == alone.text


def test_outputs_come_token_by_token(serve: Serve) -> None:
    engine = serve("llama-tiny", max_num_batched_tokens=16, max_num_seqs=4)
    engine.add_request(prompts(40)[0], greedy(5), request_id="a")
    told: list[int] = []
    texts = []
    steps = 0
    while engine.has_unfinished():
        steps += 1
        for output in engine.step():
            told += output.new_token_ids
            assert output.token_ids == told
            assert output.finished == (len(told) == 5)
            texts.append(output.text)
    assert steps == 3 + 4
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_samples_are_told_apart_by_index(serve: Serve) -> None:
    engine = serve("llama-tiny", "prefix", max_num_seqs=4)
    engine.add_request(
        prompts(40)[0], SamplingParams(n=6, temperature=1.0, max_tokens=4, ignore_eos=True), request_id="a"
    )
    finished = []
    while engine.has_unfinished():
        finished += [o for o in engine.step() if o.finished]
    assert sorted(o.index for o in finished) == list(range(6))
    assert all(o.request_id == "a" and len(o.token_ids) == 4 for o in finished)
    # The prompt's 40 tokens were computed once, by the first of those that ran together.
    forked = [o for o in finished if o.attestation.tokens_computed == 3]
    assert len(forked) == 3
    require_empty(engine)


def test_greedy_samples_of_one_request_agree(serve: Serve) -> None:
    for strategy in ("full", "prefix", "h2o", "streaming+prefix", "infinigen"):
        engine = serve("llama-tiny", strategy)
        (prompt,) = prompts(41)
        (one,) = run(engine, [prompt], greedy(10))
        engine.add_request(prompt, greedy(10, n=3), request_id="a")
        assert [o.token_ids for o in finish(engine).values()] == [one.token_ids] * 3
        require_empty(engine)


def test_min_tokens_hold_off_stop_strings(serve: Serve) -> None:
    engine = serve("llama-tiny")
    (prompt,) = prompts(20)
    text = run(engine, [prompt], greedy(30))[0].text
    (output,) = run(engine, [prompt], greedy(30, stop=(text[3],), min_tokens=20))
    assert len(output.token_ids) >= 20


def test_stats_of_a_throttled_link_say_so(serve: Serve) -> None:
    engine = serve("llama-tiny", "infinigen", links={"host:device": 12e9})
    assert engine.stats().links == {
        "host:device": "host:device throttled to 12 GB/s",
        "device:host": "device:host (not throttled)",
    }


def test_bf16_and_fp16_pools_are_that_small(serve: Serve) -> None:
    for dtype, width in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        engine = serve("llama-tiny", kv_cache_dtype=dtype, kv_cache_memory_bytes=2**17)
        assert engine.memory.layout.element_bytes == width
        assert engine.stats().pool_bytes == 2**17
        (output,) = run(engine, prompts(33), greedy(4))
        assert output.error is None


def test_stored_blocks_hold_the_kv_that_was_computed(serve: Serve) -> None:
    """Half-precision KV of a float32 model is rounded once, not twice."""
    (prompt,) = prompts(32)
    exact = serve("llama-tiny", "prefix")
    half = serve("llama-tiny", "prefix", kv_cache_dtype="float16")
    for engine in (exact, half):
        run(engine, [prompt], greedy(1))
    first = [engine.memory.arena.keys[: engine.memory.layout.pages_per_block] for engine in (exact, half)]
    layer0 = slice(0, exact.memory.layout.num_kv_heads)  # deeper layers have seen rounded KV
    assert torch.equal(first[0][layer0].half(), first[1][layer0])
