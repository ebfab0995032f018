"""Cascading keeps what the paper says, where it says, at constant memory: against a plain reference of lists."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.core.errors import CapacityError, StrategyError, UnsupportedModel
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.cascading import Cascading
from kvwise.methods.retention.strided import Layout
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.cascading_reference import Entry, Head, PlainCascading, Rules

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-5  # comparisons closer than this share of the scores would be rounding's
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 4}
UNCHUNKED = {"enable_chunked_prefill": False}
LENGTHS = (26, 45, 70, 33)
NUM_DECODED = 20


def sizes_of(method: Cascading, num_prompt: int) -> tuple[int, ...]:
    layout: Any = method.start(num_prompt)
    return tuple(layout.places.sizes)


def rules_of(method: Cascading, num_prompt: int) -> Rules:
    return Rules(
        method.sinks, sizes_of(method, num_prompt), method.beta, method.positions == "cache", method.homogeneous,
        method.eager_fill, method.mode == "released",
    )  # fmt: skip


# -- the rule by itself -----------------------------------------------------------------------------------------


class Cache:
    """Which token is in which slot, as an engine would move them: one layer, one head."""

    def __init__(self, method: Cascading, num_prompt: int) -> None:
        self.method = method
        self.layout: Layout = method.start(num_prompt)
        self.slots = np.full(method.num_slots(num_prompt) + 64, -1)
        self.num_tokens = 0

    def take(self, scores: list[float]) -> None:
        """As many tokens as scores of a stride; `scores[t]` is that of token t."""
        num_new = len(scores) - self.num_tokens
        end = self.layout.end
        self.slots[end : end + num_new] = np.arange(self.num_tokens, self.num_tokens + num_new)
        held = self.slots[: end + num_new]
        column = np.array([scores[t] if t >= 0 else np.nan for t in held], np.float32)[None, None]
        asked = self.method.asks(self.layout, num_new)
        moves = self.method.arrange(self.layout, num_new, asked, column[..., asked])
        self.slots[moves.target] = self.slots[moves.source[0, 0]]
        self.layout = moves.layout
        self.num_tokens += num_new

    def kept(self) -> list[int]:
        return sorted(t for r in self.layout.runs for t in self.slots[r.start : r.start + r.length].tolist())

    def cascade(self, number: int) -> list[int]:
        places: Any = self.layout
        start = places.places.starts[number]
        return sorted(self.slots[start : start + places.stored[number]].tolist())


def test_the_golden_trace_of_the_authors_slow_class() -> None:
    """W/N = 8, N = 4, two sinks, equal scores, after token 119."""
    for mode in ("paper", "released"):
        cache = Cache(Cascading(budget=0.34, sinks=2, eager_fill=False, mode=mode), 100)
        assert sizes_of(cache.method, 100) == (8, 8, 8, 8)
        for t in range(120):
            cache.take([1.0] * (t + 1))
        assert cache.slots[:2].tolist() == [0, 1]
        assert cache.cascade(0) == list(range(112, 120))
        assert cache.cascade(1) == [97, 99, 101, 103, 105, 107, 109, 111]
        assert cache.cascade(2) == [69, 73, 77, 81, 85, 89, 93, 95]
        assert cache.cascade(3) == [9, 17, 25, 33, 41, 49, 57, 65]


@pytest.mark.parametrize("stride", [1, 7, 50])
@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("eager_fill", [True, False])
@pytest.mark.parametrize(("sinks", "cascades", "capacity"), [(2, 4, 34), (0, 3, 20), (4, 1, 9), (3, 5, 8), (5, 4, 150)])
def test_any_scores_in_any_strides_keep_what_lists_keep(
    stride: int, mode: str, eager_fill: bool, sinks: int, cascades: int, capacity: int
) -> None:
    method = Cascading(capacity / 1000 + 1e-6, sinks, cascades, eager_fill=eager_fill, mode=mode)
    assert method.capacity(1000) == capacity
    cache, head = Cache(method, 1000), Head(rules_of(method, 1000))
    generator = np.random.default_rng(stride * 7 + capacity)
    for stop in range(stride, 351, stride):
        scores = generator.integers(0, 4, stop).astype(float).tolist()  # many are equal
        for entry in head.entries():
            entry.score = scores[entry.position]
        for t in range(stop - stride, stop):
            head.insert(Entry(t, score=scores[t]))
        cache.take(scores)
        assert cache.kept() == sorted(e.position for e in head.entries())
        order = {e.position: place for place, e in enumerate(head.entries())}
        require_places(cache, order)


def require_places(cache: Cache, order: dict[int, int]) -> None:
    """The next token sees every kept one at the distance its place in the cache says."""
    for stretch in cache.layout.runs:
        for slot in range(stretch.start, stretch.start + stretch.length):
            seen_from = cache.num_tokens + stretch.turn
            distance = seen_from - int(cache.layout.rotation[slot])
            assert distance == len(order) - order[int(cache.slots[slot])]


@pytest.mark.parametrize(("sinks", "num_tokens"), [(4, 819), (64, 32768), (4, 96), (0, 5), (3, 300)])
def test_buffers_begin_at_pages_where_that_changes_their_size_little(sinks: int, num_tokens: int) -> None:
    places: Any = Cascading((num_tokens + sinks) / 100_000 + 1e-9, sinks).start(100_000)
    sizes, starts = places.places.sizes, places.places.starts
    assert sum(sizes) == num_tokens
    assert max(sizes) - min(sizes) <= max(1, num_tokens / 4 / 8 * 2)
    assert [a + n for a, n in zip(starts[1:], sizes[1:], strict=True)] == list(starts[:-1])
    if num_tokens >= 512:
        assert all(start % 16 == 0 for start in starts)


# -- on running models ------------------------------------------------------------------------------------------

STRATEGIES = [
    ("llama-tiny", "budget=0.3", 0),  # the whole prompt is one stride
    ("llama-tiny", "budget=0.3, stride=8, beta=0.9", 0),
    ("llama-tiny", "budget=0.4, stride=16, beta=0.9, cascades=2", 1),
    ("llama-tiny", "budget=0.3, stride=8, beta=0.9, homogeneous=false, sinks=1", 2),
    ("llama-tiny", "budget=0.3, stride=5, beta=0.9, eager_fill=false", 3),
    ("llama-tiny", "budget=0.3, stride=8, beta=0.9, positions=original", 4),
    ("llama-tiny", "budget=0.3, stride=8, beta=0.9, mode=released", 5),
    ("llama-tiny", "budget=0.3, stride=8, beta=0.4", 9),  # old attention soon weighs nothing
    ("gpt_neox-tiny", "budget=0.3, stride=8, beta=0.9", 6),  # a quarter of each head is rotated
    ("gpt2-tiny", "budget=0.3, stride=8, beta=0.9, positions=original", 7),  # learned positions
    ("3m", "budget=0.5, stride=16, beta=0.99, sinks=0", 8),  # three query heads per KV head, six layers
]


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(("model", "options", "seed"), STRATEGIES)
def test_kept_sets_and_logits_equal_the_reference_at_every_layer_head_and_step(
    serve: Serve, load: Load, model: str, options: str, seed: int, settings: dict[str, Any]
) -> None:
    engine = serve(model, f"cascading({options})", blocks=400, **settings)
    many, forced = prompts(*LENGTHS, seed=seed), prompts(*[NUM_DECODED] * 4, seed=seed + 100)
    twins, seen = {}, {}
    for i, (prompt, tokens) in enumerate(zip(many, forced, strict=True)):
        name = f"r{i}"
        twins[name], seen[name] = Twin(load(model), engine.strategy.retention, prompt, tokens), []
        engine.add_request(
            prompt, greedy(NUM_DECODED, forced_tokens=tokens), request_id=name, observe=collector(seen[name])
        )
    checked = dict.fromkeys(twins, 0)
    while engine.has_unfinished():
        engine.step()
        for name, twin in twins.items():
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                assert engine.memory.placement.kept_positions(sequence) == twin.kept[sequence.num_computed]
                checked[name] += 1
    assert checked == dict.fromkeys(twins, NUM_DECODED - 1)  # the last token ends the request
    for name, twin in twins.items():
        torch.testing.assert_close(torch.stack(seen[name]), torch.stack(twin.logits), atol=3e-4, rtol=1e-3)
    require_empty(engine)


def collector(into: list[Tensor]) -> Callable[[int, int, Tensor], None]:
    return lambda index, step, logits: into.append(logits.clone())


class Twin:
    """A plain reference run beside one request of an engine, over the same forced tokens."""

    def __init__(self, loaded: Any, method: Cascading, prompt: list[int], forced: list[int]) -> None:
        plain = PlainCascading(loaded, rules_of(method, len(prompt)), method.stride)
        self.logits = [plain.prefill(prompt)]
        self.kept = {len(prompt): plain.kept()}
        for i, token in enumerate(forced[:-1]):
            self.logits.append(plain.decode(token))
            self.kept[len(prompt) + i + 1] = plain.kept()
        assert plain.margin > ROUNDING, "choose another seed: rounding would decide"


# -- memory -----------------------------------------------------------------------------------------------------


def held_pages(engine: Engine) -> int:
    return engine.memory.cache.usage().num_pages_held


def test_a_prompt_much_longer_than_the_pool_is_served_at_constant_memory(serve: Serve) -> None:
    """12 blocks of 16 tokens for 480: 48 are kept, and 64 on the way."""
    strategy = "cascading(budget=0.1, stride=64)"
    engine = serve("llama-tiny", strategy, blocks=12, max_num_batched_tokens=48, max_num_seqs=2)
    (prompt,) = prompts(480)
    engine.add_request(prompt, greedy(10), request_id="a")
    held, done = [], {}
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output
        held.append(held_pages(engine))
    assert done["a"].error is None
    assert len(done["a"].token_ids) == 10
    heads = engine.memory.layout.pages_per_block
    while_read = -(-(48 + 64) // 16) * heads
    assert set(held[:10]) == {while_read}  # no step needs more than another
    assert held[-2] == -(-49 // 16) * heads
    assert done["a"].attestation.tokens_seen == 489
    assert done["a"].attestation.tokens_dropped == (489 - 48) * heads
    require_empty(engine)
    with pytest.raises(CapacityError, match=r"112 slots for a prompt of 480 tokens, stride included"):
        serve("llama-tiny", strategy, blocks=6).add_request(prompt, greedy(4))


def test_more_requests_run_at_once_than_whole_prompts_would_fit(serve: Serve) -> None:
    engine = serve("llama-tiny", "cascading(budget=0.1, stride=32)", blocks=24, max_num_seqs=8)
    names = [engine.add_request(p, greedy(3)) for p in prompts(*[320] * 4)]
    engine.step()
    assert engine.stats().num_running == 4  # of 20 blocks each, with 24 in the pool
    done = finish(engine)
    assert [done[name].error for name in names] == [None] * 4
    assert engine.stats().num_preemptions == 0
    require_empty(engine)


def test_a_second_sample_reads_the_prompt_itself(serve: Serve) -> None:
    engine = serve("llama-tiny", "cascading(budget=0.3, stride=16)")
    (prompt,) = prompts(60)
    engine.add_request(prompt, greedy(6, n=2), request_id="a")
    done = finish(engine)
    assert done["a"].token_ids == done["a/1"].token_ids
    require_empty(engine)


def test_a_preempted_request_reads_prompt_and_output_again(serve: Serve, load: Load) -> None:
    engine = serve("llama-tiny", "cascading(budget=0.3, stride=16, beta=0.9)")
    (prompt,), (forced,) = prompts(60), prompts(20, seed=5)
    engine.add_request(prompt, greedy(20, forced_tokens=forced), request_id="a")
    while not (engine._requests and sequence_of(engine, "a").num_outputs == 9):
        engine.step()
    engine._scheduler.preempt(sequence_of(engine, "a"))
    assert held_pages(engine) == 0
    while sequence_of(engine, "a").phase is not Phase.DECODE:
        engine.step()
    sequence = sequence_of(engine, "a")
    plain = PlainCascading(load("llama-tiny"), rules_of(engine.strategy.retention, 60), 16)
    plain.prefill(prompt)
    plain.prefill(forced[:9])  # in one stride
    assert engine.memory.placement.kept_positions(sequence) == plain.kept()
    assert len(finish(engine)["a"].token_ids) == 20
    require_empty(engine)


def test_bfloat16_pages_serve(serve: Serve) -> None:
    outputs = run(serve("llama-tiny", "cascading(budget=0.3)", kv_cache_dtype="bfloat16"), prompts(60, 90), greedy(8))
    assert all(output.error is None for output in outputs)


# -- what is refused --------------------------------------------------------------------------------------------


def test_models_without_rotation_are_refused_with_the_way_out(serve: Serve) -> None:
    with pytest.raises(UnsupportedModel, match=r"gpt2-tiny does not rotate .*positions=original"):
        serve("gpt2-tiny", "cascading")
    assert serve("gpt2-tiny", "cascading(budget=1)")


def test_sliding_windows_are_refused_unless_texts_stay_within(serve: Serve) -> None:
    with pytest.raises(UnsupportedModel, match="sliding window of 8 tokens: set max_model_len to at most 8"):
        serve("mistral-tiny", "cascading")
    assert serve("mistral-tiny", "cascading", max_model_len=8)


@pytest.mark.parametrize("line", ["cascading+prefix", "cascading+infinigen", "cascading+int4", "cascading+kivi"])
def test_what_cannot_work_together_is_refused(line: str) -> None:
    with pytest.raises(StrategyError, match="cannot work together"):
        parse(line)


@pytest.mark.parametrize(
    "option", ["budget=0", "sinks=-1", "cascades=0", "beta=1", "beta=0", "stride=0", "positions=here", "mode=fast"]
)
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(StrategyError, match=f"cascading: {option}.* is out of range"):
        parse(f"cascading({option})")
