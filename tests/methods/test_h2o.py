"""H2O keeps what the paper says: against a plain reference on running models, and against numpy on random tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.retention.base import Kept, PromptView
from kvwise.methods.retention.h2o import H2O
from kvwise.models import random
from kvwise.models.support import tiny_config
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.h2o_reference import PlainH2O
from tests.methods.retention_views import decode_view, prompt_view, victims

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-5  # decisions closer than this would be rounding's
ROUNDING_OF_MEANS = 1e-8  # means over rows are closer to each other, and as many times more exact
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 4}
UNCHUNKED = {"enable_chunked_prefill": False}
LENGTHS = (26, 45, 70, 33)
NUM_DECODED = 20


class Twin:
    """A plain reference run beside one request of an engine, over the same forced tokens."""

    def __init__(self, loaded: Any, prompt: list[int], forced: list[int], method: H2O) -> None:
        self.plain = PlainH2O(loaded, method.budget, method.recent, method.normalised, method.layers, method.heads)
        self.logits = [self.plain.prefill(prompt)]
        self.kept = {len(prompt): self.plain.kept()}
        for i, token in enumerate(forced[:-1]):
            self.logits.append(self.plain.decode(token))
            self.kept[len(prompt) + i + 1] = self.plain.kept()
        assert self.plain.margin > (ROUNDING_OF_MEANS if method.normalised else ROUNDING), (
            "choose another seed: rounding would decide"
        )


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(
    ("model", "method", "seed"),
    [
        ("llama-tiny", H2O(0.3), 0),  # two query heads per KV head
        ("mistral-tiny", H2O(0.3), 0),  # a window of 8 in all layers
        ("gemma2-tiny", H2O(0.4), 0),  # windows in every other layer, softcap
        ("gpt2-tiny", H2O(0.2, recent=0.25), 0),  # learned positions, as many KV heads as query heads
        ("3m", H2O(0.5, recent=0.9), 0),  # three query heads per KV head, six layers
        ("gpt_neo-tiny", H2O(0.15, recent=0.0), 0),  # heavy hitters and the newest token only
        ("llama-tiny", H2O(0.3, normalised=True), 0),
        ("gemma2-tiny", H2O(0.4, normalised=True), 0),
        ("llama-tiny", H2O(0.3, layers="pyramid"), 0),
        ("gpt2-tiny", H2O(0.4, recent=0.25, heads="adakv"), 0),
        ("llama-tiny", H2O(0.4, layers="pyramid", heads="adakv"), 0),
    ],
    ids=str,
)
def test_kept_sets_equal_the_reference_at_every_layer_head_and_step(
    serve: Serve, load: Load, model: str, method: H2O, seed: int, settings: dict[str, Any]
) -> None:
    engine = serve(model, str(method), blocks=400, **settings)
    many, forced = prompts(*LENGTHS, seed=seed), prompts(*[NUM_DECODED] * 4, seed=seed + 100)
    twins = {
        f"r{i}": Twin(load(model), prompt, tokens, method)
        for i, (prompt, tokens) in enumerate(zip(many, forced, strict=True))
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in twins}
    for name, prompt, tokens in zip(twins, many, forced, strict=True):
        observe = _collector(seen[name])
        engine.add_request(prompt, greedy(NUM_DECODED, forced_tokens=tokens), request_id=name, observe=observe)
    checked = _step_and_compare(engine, twins)
    assert checked == dict.fromkeys(twins, NUM_DECODED - 1)  # the last token ends the request
    for name, twin in twins.items():
        torch.testing.assert_close(torch.stack(seen[name]), torch.stack(twin.logits), atol=2e-4, rtol=1e-4)


def _collector(into: list[Tensor]) -> Callable[[int, int, Tensor], None]:
    return lambda index, step, logits: into.append(logits.clone())


def _step_and_compare(engine: Engine, twins: dict[str, Twin]) -> dict[str, int]:
    checked = dict.fromkeys(twins, 0)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
        for name, twin in twins.items():
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                kept = engine.memory.placement.kept_positions(sequence)
                assert kept == twin.kept[sequence.num_computed], f"{name} at {sequence.num_computed} tokens"
                checked[name] += 1
    return checked


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "opt", "gpt2"])
def test_mass_of_a_prompt_is_the_column_sum_of_transformers_attention(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, architecture: str, settings: dict[str, Any]
) -> None:
    """Chunked or not: the rows of a later chunk add to the columns of an earlier one."""
    views: dict[int, PromptView] = {}
    keep = H2O.keep

    def note(self: H2O, view: PromptView) -> Kept:
        views[view.num_tokens] = view
        return keep(self, view)

    monkeypatch.setattr(H2O, "keep", note)
    engine = serve(f"{architecture}-tiny", "h2o", blocks=20, **settings)
    many = prompts(*LENGTHS)
    run(engine, many, greedy(1))
    assert views == {}  # a request that ends with its prefill drops nothing
    run(engine, prompts(*LENGTHS, seed=1), greedy(9))  # pages that others have used before
    run(engine, many, greedy(2))
    model = random.build(tiny_config(architecture), 0, lambda num: None)
    for prompt in many:
        with torch.inference_mode():
            found = model(torch.tensor([prompt]), output_attentions=True).attentions
        columns = torch.stack([a[0].sum(1) for a in found])  # [L, Hq, T]: summed over query rows
        grouped = columns.unflatten(1, (engine.memory.layout.num_kv_heads, -1)).sum(2)
        torch.testing.assert_close(views[len(prompt)].mass, grouped, atol=1e-4, rtol=1e-4)


# -- the method alone -------------------------------------------------------------------------------------------


def plain_keep(mass: np.ndarray, capacity: int, recent: int, normalised: bool = False) -> np.ndarray:
    kept = np.zeros(mass.shape, bool)
    if normalised:
        mass = mass / np.arange(mass.shape[-1], 0, -1, dtype=np.float32)  # token t is seen by rows t .. T - 1
    for place in np.ndindex(mass.shape[:2]):
        row = mass[place]
        older = len(row) - recent
        if len(row) <= capacity:
            kept[place] = True
            continue
        kept[place][older:] = True
        kept[place][np.argsort(-row[:older])[: capacity - recent]] = True
    return kept


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 10, 57, 200])
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("recent", [0.0, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_keep_equals_numpy(num_tokens: int, budget: float, recent: float, normalised: bool) -> None:
    method = H2O(budget, recent, normalised)
    capacity = method.capacity(num_tokens)
    assert capacity == max(2, int(num_tokens * budget))
    mass = np.random.default_rng(num_tokens).random((3, 2, num_tokens), np.float32)
    kept = method.keep(prompt_view(method, num_tokens, (3, 2), mass=torch.from_numpy(mass)))
    num_recent = max(1, int(capacity * recent))
    expected = plain_keep(mass, capacity, num_recent, normalised)
    np.testing.assert_array_equal(kept.mask.numpy(), expected)
    assert kept.limit is not None and kept.marks is not None
    assert (kept.limit == capacity).all()
    assert (kept.marks == num_recent).all()
    assert (expected.sum(-1) == min(capacity, num_tokens)).all()


@pytest.mark.parametrize("recent", [0.0, 0.29, 0.5, 0.58, 1.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_victims_equal_numpy(recent: float, normalised: bool) -> None:
    rng = np.random.default_rng(1)
    capacities = [2, 7, 50, 100]
    num_slots = 112
    shape = (len(capacities), 3, 2, num_slots)
    positions, mass = np.zeros(shape, np.int32), rng.random(shape, np.float32)
    used = np.zeros(shape, bool)
    num_tokens = np.array([40, 60, 300, 400])
    for place in np.ndindex(shape[:3]):
        count = capacities[place[0]] + 1
        total = num_tokens[place[0]]
        # Kept positions in slot order that is not position order, the newest among them.
        positions[place][:count] = rng.permutation(
            np.append(rng.choice(total - 1, count - 1, replace=False), total - 1)
        )
        used[place][:count] = True
    method = H2O(0.2, recent, normalised)
    latest = [max(1, int(capacity * recent)) for capacity in capacities]
    view = decode_view(
        torch.from_numpy(positions), torch.from_numpy(used), num_tokens.tolist(), capacities,
        mass=torch.from_numpy(mass), marks=latest,
    )  # fmt: skip
    found = victims(method, view).numpy()
    if normalised:
        with np.errstate(divide="ignore"):  # in slots that are not in use
            mass = mass / (num_tokens[:, None, None, None] - positions)
    for place in np.ndindex(shape[:3]):
        free = used[place] & (positions[place] < num_tokens[place[0]] - latest[place[0]])
        if free.any():
            assert found[place] == min(np.flatnonzero(free), key=lambda i: mass[place][i])


def test_of_equal_masses_the_earlier_stay() -> None:
    method = H2O(0.2, recent=0.3)
    kept = method.keep(prompt_view(method, 50, (1, 1), mass=torch.ones(1, 1, 50)))
    assert kept.mask.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 47, 48, 49]


# -- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5])
def test_pages_are_freed_as_the_budget_says(serve: Serve, budget: float) -> None:
    engine = serve("llama-tiny", f"h2o(budget={budget})", blocks=60)
    (prompt,) = prompts(320)
    engine.add_request(prompt, greedy(30), request_id="a")
    engine.step()
    usage, layout = engine.memory.cache.usage(), engine.memory.layout
    slots = int(320 * budget) + 1
    assert usage.num_pages_held == layout.num_blocks_for(slots) * layout.pages_per_block
    assert usage.num_pages_held < 320 // 16 * layout.pages_per_block
    sequence = sequence_of(engine, "a")
    assert sequence.attestation.bytes_freed == (20 - layout.num_blocks_for(slots)) * layout.block_bytes
    assert sequence.attestation.tokens_dropped == (320 - int(320 * budget)) * layout.pages_per_block
    assert engine.stats().kv_bytes["device"] == layout.num_blocks_for(slots) * layout.block_bytes
    (output,) = finish(engine).values()
    dropped = 320 + 29 - int(320 * budget)
    assert output.attestation.tokens_dropped == dropped * layout.pages_per_block == output.attestation.did["h2o"]
    assert engine.memory.cache.usage().num_free == engine.memory.cache.usage().num_blocks


def most_running(engine: Engine, many: list[list[int]]) -> int:
    for prompt in many:
        engine.add_request(prompt, greedy(48))
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats().num_running)
    require_empty(engine)
    return most


def test_a_smaller_budget_admits_more_requests_to_the_same_pool(serve: Serve) -> None:
    many = prompts(*[128] * 20)
    size = 40 * 16 * 2 * 16 * 4 * 8  # 40 blocks of plain KV
    settings = {"kv_cache_memory_bytes": size, "max_num_batched_tokens": 256}
    counts = {
        strategy: most_running(serve("llama-tiny", strategy, **settings), many)
        for strategy in ("full", "h2o(budget=0.5)", "h2o(budget=0.2)", "h2o(budget=0.1)")
    }
    print(counts)  # shown by pytest -s: concurrent requests by strategy
    assert list(counts.values()) == sorted(counts.values())
    assert counts["h2o(budget=0.2)"] >= 2 * counts["full"]


def test_budget_one_drops_nothing(serve: Serve) -> None:
    engine = serve("llama-tiny", "h2o(budget=1)")
    assert engine.strategy.retention.capacity(40) == 40
    (output,) = run(engine, prompts(40), greedy(5))
    assert output.attestation.tokens_dropped == 0
    assert "mass" not in engine.memory.arena.columns


def test_a_request_of_one_token_is_served(serve: Serve) -> None:
    engine = serve("llama-tiny", "h2o(budget=0.1)")
    (output,) = run(engine, [[5]], greedy(40))
    assert len(output.token_ids) == 40
    require_empty(engine)
