"""Encodings on a running model: what is stored, and read, is what numpy makes of the very keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.engine.engine import Engine
from kvwise.engine.placement.page_part import PagePart
from kvwise.engine.sequence import Phase
from kvwise.engine.sequence import Sequence as Seq
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.fake_quantised import ENCODED, Encoded, FakeQuantised

Serve = Callable[..., Any]
Load = Callable[[str], Any]
Kept = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]  # by request and layer: keys and values [n, H, D]

LENGTHS = (1, 40, 70)
NUM_OUTPUT = 27
CHUNKED = {"max_num_batched_tokens": 19, "max_num_seqs": 3}
UNCHUNKED = {"enable_chunked_prefill": False}
BOTH = pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
LINES = pytest.mark.parametrize("line", ENCODED)


class Witness:
    """Sees every key and value at full precision: those of a prompt when it settles, the others as they come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, names: list[str]) -> None:
        self.engine = engine
        self.seen: Kept = {}
        self._names = names
        settle, attend = engine.memory.placement.settle, PagePart.attend

        def settle_seen(sequence: Seq) -> bool:
            if not engine.memory.cache.holds_pages(sequence.row):
                self._note_prompt(sequence)
            return settle(sequence)

        def attend_seen(
            part: PagePart, layer: int, queries: Tensor, keys: Tensor, values: Tensor, **more: Any
        ) -> Tensor:
            for place, row in enumerate(part.index.tolist()):
                self.seen[self._name(row), layer].append(
                    (keys[place : place + 1].clone(), values[place : place + 1].clone())
                )
            return attend(part, layer, queries, keys, values, **more)

        monkeypatch.setattr(engine.memory.placement, "settle", settle_seen)
        monkeypatch.setattr(PagePart, "attend", attend_seen)

    def _name(self, row: int) -> str:
        running = [name for name in self._names if name in self.engine._requests]
        return next(name for name in running if sequence_of(self.engine, name).row == row)

    def _note_prompt(self, sequence: Seq) -> None:
        arena, layout = self.engine.memory.arena, self.engine.memory.layout
        blocks = self.engine.memory.cache.tables[sequence.row, : layout.num_blocks_for(sequence.num_computed)]
        shape = (arena.num_blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
        for layer in range(layout.num_layers):
            keys, values = (
                pages.view(shape)[blocks, layer].transpose(1, 2).flatten(0, 1)[: sequence.num_computed].clone()
                for pages in (arena.keys, arena.values)
            )
            self.seen[self._name(sequence.row), layer] = [(keys, values)]

    def exact(self, name: str, layer: int) -> tuple[Any, Any]:
        """All keys and all values [T, H, D] so far."""
        keys, values = zip(*self.seen[name, layer], strict=True)
        return torch.cat(keys).numpy(), torch.cat(values).numpy()


def stored(engine: Engine, row: int, layer: int, head: int) -> tuple[Tensor, Tensor, int, int]:
    """Sealed keys [nk, key dim] and values [nv, D] as read by their codes, and how many tokens each are."""
    placement: Any = engine.memory.placement
    packed, state = engine.memory.arena.packed, placement._state
    num_keys, num_values = int(state.key_length[row, layer, head]), int(state.value_length[row, layer, head])
    if num_keys == 0:
        return torch.empty(0), torch.empty(0), 0, num_values
    pages = state.packed[row, layer, head, : -(-num_keys // packed.format.page_tokens)].long()
    keys, values = engine.memory.kernels.unseal(packed, pages)
    return keys.flatten(0, 1)[:num_keys], values.flatten(0, 1)[:num_values], num_keys, num_values


def require_stored(witness: Witness, encoded: Encoded, name: str, dense: FakeQuantised) -> int:
    """Every layer and head of a settled request holds the codes of its own keys and values; tokens that are sealed."""
    engine, sequence, checked = witness.engine, sequence_of(witness.engine, name), 0
    for layer in range(engine.memory.layout.num_layers):
        keys, values = witness.exact(name, layer)
        wanted = encoded.counts(layer, len(keys), sequence.num_prompt)
        for head in range(engine.memory.layout.num_kv_heads):
            held_keys, held_values, *counts = stored(engine, sequence.row, layer, head)
            num_sealed, _ = counts
            assert tuple(counts) == wanted
            wanted_keys = encoded.keys(keys[: wanted[0], head]) if wanted[0] else keys[:0, head]
            wanted_values = encoded.values(values[: wanted[1], head]) if wanted[1] else values[:0, head]
            if not num_sealed:
                continue
            if encoded.ratio:
                wanted_keys = wanted_keys[:, dense.channels[layer, head]]
            np.testing.assert_allclose(held_keys.numpy(), wanted_keys, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(held_values.numpy(), wanted_values, rtol=1e-5, atol=1e-6)
            checked += sum(wanted)
    return checked


@dataclass
class Answers:
    """What dense computations answer to each request, by its name, and to each of its output's tokens."""

    dense: dict[str, FakeQuantised]
    logits: dict[tuple[str, int], Tensor]


@pytest.fixture(scope="module")
def answer(load: Load) -> Callable[[str], Answers]:
    """`answer(line)`: computed once for both ways to compute a prompt."""

    def compute(line: str) -> Answers:
        many, forced = prompts(*LENGTHS), prompts(*[NUM_OUTPUT] * len(LENGTHS), seed=9)
        found = Answers({str(n): FakeQuantised(load("llama-tiny"), ENCODED[line]) for n in range(len(many))}, {})
        for (name, dense), prompt, then in zip(found.dense.items(), many, forced, strict=True):
            for step in range(NUM_OUTPUT):
                found.logits[name, step] = dense.step(prompt if step == 0 else [then[step - 1]])
        return found

    return cache(compute)


@LINES
@BOTH
def test_what_is_stored_and_what_is_answered(
    serve: Serve, answer: Callable[[str], Answers], monkeypatch: pytest.MonkeyPatch, line: str, settings: dict[str, Any]
) -> None:
    """After every few steps, in a ragged batch; the logits are those of a dense computation on the same codes."""
    answers, many, forced = answer(line), prompts(*LENGTHS), prompts(*[NUM_OUTPUT] * len(LENGTHS), seed=9)
    packed = ENCODED[line.replace(", reader=4", "")]  # the draft's reader finds the target's codes
    engine = serve("llama-tiny", line, kernels="reference", **{**settings, "max_num_seqs": len(LENGTHS)})
    names = [str(number) for number in range(len(many))]
    witness, logits = Witness(monkeypatch, engine, names), {}

    def note_of(name: str) -> Any:
        def note(index: int, step: int, found: Tensor) -> None:
            logits[name, step] = found.clone()

        return note

    for name, prompt, then in zip(names, many, forced, strict=True):
        engine.add_request(prompt, greedy(NUM_OUTPUT, forced_tokens=then), request_id=name, observe=note_of(name))
    checked = steps = 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
        for name in names if steps % 7 == 0 else ():
            if name in engine._requests and sequence_of(engine, name).phase is Phase.DECODE:
                checked += require_stored(witness, packed, name, answers.dense[name])
    assert checked > 500
    for key, wanted in answers.logits.items():
        error = float((logits[key] - wanted).norm() / wanted.norm())
        assert error < 0.02, (key, error)
    require_empty(engine)


@pytest.mark.parametrize(
    "line",
    [
        "kivi(residual=128)", "think(ratio=0)", "think(recent=200)", "hierarchical(group=44)", "int4(native_layers=4)",
        "int4(group=128)", "fp8(group=128)",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("model", "settings"), [("llama-tiny", CHUNKED), ("gpt2-tiny", UNCHUNKED)])
def test_where_nothing_is_sealed_answers_are_full_to_the_token(
    serve: Serve, line: str, settings: dict[str, Any], model: str
) -> None:
    many = prompts(*LENGTHS)
    engine = serve(model, line, **settings)
    found = [output.token_ids for output in run(engine, many, greedy(16))]
    assert found == [output.token_ids for output in run(serve(model, "full"), many, greedy(16))]
    require_empty(engine)


@pytest.mark.parametrize("line", ["int8", "kivi(bits=8, group=16, residual=32)", "hierarchical(group=16)", "fp8"])
def test_the_fastest_kernels_read_about_the_same(serve: Serve, line: str) -> None:
    """Integer dot products add an error of their own, a few in a hundred."""
    answers = []
    for kernels in ("reference", None):
        engine = serve("llama-tiny", line, kernels=kernels, **CHUNKED)
        logits: list[Tensor] = []
        engine.add_request(
            prompts(100)[0],
            greedy(20, forced_tokens=prompts(20, seed=3)[0]),
            observe=lambda index, step, found, logits=logits: logits.append(found.clone()),
        )
        finish(engine)
        answers.append(torch.stack(logits))
    assert float((answers[0] - answers[1]).norm() / answers[0].norm()) < 0.05


SHORT = ["fp8(group=16)", "int4(group=16)", "kivi(group=16, residual=16)", "hierarchical(group=16)", "think(recent=8)"]


@pytest.mark.parametrize("line", SHORT)
def test_a_prompt_found_in_the_prefix_cache_is_answered_the_same(serve: Serve, line: str) -> None:
    """Shared blocks stay native and whole; what is packed is each request's own."""
    engine, prompt = serve("llama-tiny", f"{line}+prefix", **CHUNKED), prompts(90)[0]
    first, second = (run(engine, [prompt], greedy(12))[0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens >= 48) == (0, True)
    alone = run(serve("llama-tiny", line, **UNCHUNKED), [prompt], greedy(12))[0]
    assert first.token_ids == alone.token_ids
    require_empty(engine)


@pytest.mark.parametrize("line", SHORT)
def test_a_preempted_request_goes_on_as_if_it_had_not_been(serve: Serve, line: str) -> None:
    """Computed again in full precision and sealed anew, it ends; so do the samples that fork from one prompt."""
    engine = serve("llama-tiny", line, blocks=60, **CHUNKED)
    names = [engine.add_request(prompt, greedy(24, n=2)) for prompt in prompts(40, 61)]
    done: dict[str, Any] = {}
    for step in range(300):
        done |= {f"{o.request_id}/{o.index}": o for o in engine.step() if o.finished}
        if step % 9 == 8 and names[0] in engine._requests:
            sequence = sequence_of(engine, names[0])
            if sequence.phase is Phase.DECODE:
                engine._scheduler.preempt(sequence)
        if not engine.has_unfinished():
            break
    assert engine.stats().num_preemptions > 0
    assert [len(output.token_ids) for output in done.values()] == [24] * 4
    assert all(output.error is None for output in done.values())
    require_empty(engine)


@pytest.mark.parametrize("line", ["int4(group=16)", "kivi(group=16, residual=16)"])
def test_packing_frees_memory_that_admits_more(serve: Serve, line: str) -> None:
    """In a pool that holds one native request at a time, several packed ones run at once."""
    most = {}
    for strategy in ("full", line):
        engine = serve("llama-tiny", strategy, blocks=24, max_num_seqs=8, **UNCHUNKED)
        for prompt in prompts(*[200] * 5):
            engine.add_request(prompt, greedy(30))
        running = 0
        while engine.has_unfinished():
            engine.step()
            running = max(running, engine.memory.cache.usage().num_sequences)
        most[strategy] = running
        require_empty(engine)
    assert most[line] >= 2 * most["full"]
