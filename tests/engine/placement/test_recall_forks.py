"""Samples of one prompt under a selection method fork from one prefill, and answer as if each were computed apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.output import FinishReason, RequestOutput
from kvwise.engine.engine import Engine
from kvwise.methods.selection.infinigen import InfiniGenIndex
from tests.engine.runs import greedy, prompts, require_empty, run, sequence_of

Serve = Callable[..., Any]

METHODS = ["infinigen(budget=0.3)", "topk(budget=0.1)", "infinigen(budget=0.3)+prefix", "topk(budget=0.1)+prefix"]
QUESTIONS = [[3, 4, 9], [5, 9, 9], [6, 7, 8], [1, 2, 3]]


def ask(engine: Engine, prompt: list[int], steps: int = 10_000) -> tuple[dict[int, RequestOutput], dict[int, Tensor]]:
    """Final outputs and logits [N, V] of samples that each begin with a question."""
    rows: dict[int, list[Tensor]] = {i: [] for i in range(len(QUESTIONS))}
    params = [greedy(len(q) + 6, forced_tokens=q) for q in QUESTIONS]
    engine.add_request(
        prompt, params, request_id="asked", observe=lambda i, step, logits: rows[i].append(logits.clone())
    )
    done: dict[int, RequestOutput] = {}
    while engine.has_unfinished():
        done |= {o.index: o for o in engine.step() if o.finished}
    return done, {i: torch.stack(found) for i, found in rows.items()}


@pytest.mark.parametrize("strategy", METHODS)
@pytest.mark.parametrize("length", [48, 50])  # whole blocks, and a partly filled one that each fork copies
def test_forks_answer_as_samples_computed_apart(serve: Serve, strategy: str, length: int) -> None:
    (prompt,) = prompts(length)
    plain = strategy.removesuffix("+prefix")
    apart, expected = ask(serve("llama-tiny", plain, max_num_seqs=1), prompt)  # one at a time: no sample can fork
    assert all(o.attestation.tokens_computed >= length for o in apart.values())
    engine = serve("llama-tiny", strategy, max_num_batched_tokens=64)
    forked, found = ask(engine, prompt)
    for index, output in forked.items():
        assert output.token_ids == apart[index].token_ids
        torch.testing.assert_close(found[index], expected[index], atol=1e-4, rtol=1e-4)
        assert output.attestation.tokens_fetched == apart[index].attestation.tokens_fetched
    assert [forked[i].attestation.tokens_computed for i in range(4)] == [length + 8, 8, 8, 8]
    assert [forked[i].attestation.tokens_reused for i in range(4)] == [0, length, length, length]
    require_empty(engine)


def test_each_fork_holds_its_own_host_memory(serve: Serve) -> None:
    engine = serve("llama-tiny", "topk")
    (prompt,) = prompts(50)
    engine.add_request(prompt, greedy(4, n=3), request_id="a")
    engine.step()
    assert all(sequence_of(engine, "a", i).settled for i in range(3))
    assert engine.stats().kv_bytes["host"] == 3 * 4 * engine.memory.layout.block_bytes
    engine.abort("a")
    require_empty(engine)


@pytest.mark.parametrize("strategy", METHODS[:2])
def test_without_room_on_the_host_a_sample_is_computed_apart(serve: Serve, strategy: str) -> None:
    (prompt,) = prompts(50)
    expected, _ = ask(serve("llama-tiny", strategy), prompt)
    block = 2 * 16 * 16 * 4 * 4 * 2
    engine = serve("llama-tiny", strategy, kv_offloading_bytes=9 * block)  # two of the four
    outputs, _ = ask(engine, prompt)
    assert [outputs[i].token_ids for i in range(4)] == [expected[i].token_ids for i in range(4)]
    assert sum(o.attestation.tokens_reused > 0 for o in outputs.values()) == 1
    require_empty(engine)


@pytest.mark.parametrize("strategy", METHODS[:2])
def test_a_fork_that_is_preempted_is_computed_again(serve: Serve, strategy: str) -> None:
    engine = serve("llama-tiny", strategy.replace("0.3", "1, alpha=1e9, ratio=1").replace("0.1", "1"))
    (prompt,) = prompts(50)
    (expected,) = run(serve("llama-tiny", "full"), [prompt], greedy(12))
    engine.add_request(prompt, greedy(12, n=3), request_id="a")
    for _ in range(4):
        engine.step()
    engine._scheduler.preempt(sequence_of(engine, "a", 1))
    done = {}
    while engine.has_unfinished():
        done |= {o.index: o.token_ids for o in engine.step() if o.finished}
    assert done == dict.fromkeys(range(3), expected.token_ids)
    require_empty(engine)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_method_that_cannot_fork_fails_the_siblings_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    (prompt,) = prompts(40)
    (expected,) = run(serve("llama-tiny", "infinigen"), [prompt], greedy(num_tokens))

    def fail(self: InfiniGenIndex, row: int, target: int) -> None:
        raise ZeroDivisionError("no fork today")

    monkeypatch.setattr(InfiniGenIndex, "fork", fail)
    engine = serve("llama-tiny", "infinigen")
    engine.add_request(prompt, greedy(num_tokens, n=3), request_id="a")
    done = {}
    while engine.has_unfinished():
        done |= {o.index: o for o in engine.step() if o.finished}
    assert done[0].token_ids == expected.token_ids
    for sibling in (done[1], done[2]):
        if num_tokens == 1:  # it ended before its KV was to move
            assert sibling.finish_reason is FinishReason.LENGTH
        else:
            assert sibling.error == "ZeroDivisionError: no fork today"
    require_empty(engine)
    assert not engine.memory.placement._recall.failures
