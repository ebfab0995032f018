"""KVMerger merges what its description says, at every layer and head of running models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.methods.retention.base import Kept, PromptView
from kvwise.methods.retention.kvmerger import KVMerger
from kvwise.methods.retention.merging import gaussian_sets
from tests.engine.runs import greedy, prompts, run, sequence_of
from tests.methods.following import CHUNKED, UNCHUNKED, follow
from tests.methods.kvmerger_reference import PlainKVMerger, plain_layers, plain_merge, plain_pivot, plain_sets
from tests.methods.plain_run import Head
from tests.methods.retention_views import prompt_view

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-7


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(
    ("model", "options", "seed"),
    [
        ("llama-tiny", {"budget": 0.5}, 0),
        ("llama-tiny", {"budget": 0.7, "threshold": 0.6}, 0),
        ("mistral-tiny", {"budget": 0.35, "heavy": 0.1}, 0),
        ("gemma2-tiny", {"budget": 0.5, "recent": 0.0}, 0),
        ("gpt2-tiny", {"budget": 0.5}, 0),
        ("3m", {"budget": 0.6}, 0),  # six layers: the first two and the last stay whole
    ],
)
def test_a_running_model_holds_what_the_reference_holds(
    serve: Serve, load: Load, model: str, options: dict[str, float], seed: int, settings: dict[str, Any]
) -> None:
    rules = [PlainKVMerger(**options) for _ in range(4)]
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    engine = serve(model, f"kvmerger({told})", blocks=400, **settings)
    follow(engine, load(model), rules, (26, 45, 70, 33), num_decoded=6, seed=seed)
    assert min(rule.margin for rule in rules) > ROUNDING, "choose another seed: rounding would decide"


def smooth(num_tokens: int, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mass [L, H, T], and keys and values [L, H, T, D] of which neighbours are alike now and then."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(*shape, num_tokens, 6, generator=generator)
    steps *= torch.rand(*shape, num_tokens, 1, generator=generator)
    return (
        torch.rand(*shape, num_tokens, generator=generator),
        steps.cumsum(2) / 2,
        torch.randn(*shape, num_tokens, 6, generator=generator),
    )


def view_of(method: KVMerger, mass: Tensor, keys: Tensor, num_outputs: int = 0) -> PromptView:
    num_prompt = mass.shape[-1] - num_outputs
    view = prompt_view(method, num_prompt, tuple(mass.shape[:2]), num_outputs=num_outputs, mass=mass)  # type: ignore[arg-type]
    return replace(view, keys=lambda layer: keys[layer])


def mixed(weights: Tensor, kept: Kept, rows: Tensor) -> Tensor:
    assert kept.merge is not None
    target = kept.merge.target[..., None].expand_as(rows)
    return torch.zeros_like(rows).scatter_add_(2, target, rows * weights[..., None])


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("threshold", [None, 0.9, 0.3])
def test_sets_and_merged_rows_equal_the_reference(num_layers: int, budget: float, threshold: float | None) -> None:
    method = KVMerger(budget, threshold)
    mass, keys, values = smooth(50, (num_layers, 2), num_layers)
    kept = method.keep(view_of(method, mass, keys))
    layers = [
        [Head(list(range(50)), list(keys[i, h]), list(values[i, h]), mass[i, h].tolist()) for h in range(2)]
        for i in range(num_layers)
    ]
    PlainKVMerger(budget, 1e9 if threshold is None else threshold).settle(layers)
    assert kept.merge is not None
    new_keys, new_values = (
        mixed(w, kept, rows) for w, rows in ((kept.merge.key_weights, keys), (kept.merge.value_weights, values))
    )
    for i, layer in enumerate(layers):
        for h, head in enumerate(layer):
            assert kept.mask[i, h].nonzero().flatten().tolist() == head.positions
            torch.testing.assert_close(new_keys[i, h, head.positions], torch.stack(head.keys), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(new_values[i, h, head.positions], torch.stack(head.values), atol=1e-5, rtol=1e-4)
    capacity = method.capacity(50)
    assert capacity is not None
    assert int(kept.mask.sum()) <= capacity * num_layers * 2
    if threshold is None:
        merging, left = plain_layers(num_layers, 50, capacity)
        assert int(kept.mask[merging.start : merging.stop].sum()) == left * len(merging) * 2  # none too few


def test_lengths_differ_by_head_and_the_newest_token_stays() -> None:
    method = KVMerger(0.5, first=0, last=0)
    mass, keys, _ = smooth(200, (3, 2), 0)
    mask = method.keep(view_of(method, mass, keys)).mask
    assert len(mask.sum(-1).unique()) > 1
    assert bool(mask[..., -1].all())
    assert int(mask.sum()) == 100 * 6


def test_layers_at_the_ends_stay_whole_while_the_others_can_make_up_for_them() -> None:
    assert KVMerger().merged_layers(32, 1000, 500) == (range(2, 31), (32 * 500 - 3 * 1000) // 29)
    assert KVMerger().merged_layers(4, 1000, 500) == (range(1, 4), (4 * 500 - 1000) // 3)
    assert KVMerger().merged_layers(4, 1000, 300) == (range(4), 300)
    assert KVMerger(first=0, last=0).merged_layers(32, 1000, 500) == (range(32), 500)
    assert KVMerger(first=50, last=50).merged_layers(3, 100, 99)[0] == range(2, 3)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 5), (9,)])
def test_gaussian_sets_equal_the_formula(sizes: tuple[int, ...]) -> None:
    mass, keys, values = (rows[0] for rows in smooth(sum(sizes), (1, 2), 4))
    keys *= 0.3
    joined = torch.ones(2, sum(sizes) - 1, dtype=torch.bool)
    for end in torch.tensor(sizes).cumsum(0).tolist()[:-1]:
        joined[:, end - 1] = False
    target, key_weights, value_weights = gaussian_sets(joined, keys, mass)
    for head in range(2):
        first = 0
        for size in sizes:
            members = list(range(first, first + size))
            pivot = plain_pivot(members, mass[head].tolist())
            assert set(target[head, members].tolist()) == {pivot}
            key, value = plain_merge(keys[head, members], values[head, members], members.index(pivot))
            torch.testing.assert_close((key_weights[head, members, None] * keys[head, members]).sum(0), key)
            torch.testing.assert_close((value_weights[head, members, None] * values[head, members]).sum(0), value)
            torch.testing.assert_close(key_weights[head, members].sum(), torch.tensor(1.0))
            torch.testing.assert_close(value_weights[head, members].sum(), torch.tensor(float(size)))
            first += size


def test_sets_of_equal_keys_are_their_means() -> None:
    keys = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0)).expand(1, 4, 3)
    _, key_weights, value_weights = gaussian_sets(torch.ones(1, 3, dtype=torch.bool), keys, torch.rand(1, 4))
    assert key_weights.tolist() == [[0.25] * 4]
    assert value_weights.tolist() == [[1.0] * 4]


def test_the_scan_ends_a_set_at_a_protected_token() -> None:
    assert plain_sets([0.9, 0.9, 0.2, 0.9, 0.9], {4}, 0.5) == [[0, 1, 2], [3], [4], [5]]


def test_outputs_of_a_preempted_request_stay() -> None:
    method = KVMerger(0.5)
    mass, keys, _ = smooth(60, (4, 2), 0)
    kept = method.keep(view_of(method, mass, keys, num_outputs=10))
    assert bool(kept.mask[..., 50:].all())
    assert int(kept.mask[..., :50].sum()) <= 25 * 8
    assert kept.merge is not None
    assert torch.equal(kept.merge.target[..., 50:], torch.arange(50, 60).expand(4, 2, -1))


def test_a_prompt_within_the_budget_answers_as_full(serve: Serve) -> None:
    """Two tokens stay, whatever the budget."""
    many = prompts(1, 2)
    ours = run(serve("llama-tiny", "kvmerger(budget=0.1)"), many, greedy(20))
    theirs = run(serve("llama-tiny", "full"), many, greedy(20))
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]


def test_pages_of_short_heads_are_freed(serve: Serve) -> None:
    engine = serve("llama-tiny", "kvmerger(budget=0.2, first=0, last=0)", blocks=60)
    engine.add_request(prompts(320)[0], greedy(4), request_id="a")
    engine.step()
    placement, layout = engine.memory.placement, engine.memory.layout
    counts = [len(head) for layer in placement.kept_positions(sequence_of(engine, "a")) for head in layer]
    assert sum(counts) == 64 * len(counts)
    assert len(set(counts)) > 1
    assert engine.memory.cache.usage().num_pages_held == sum(layout.num_blocks_for(count + 1) for count in counts)
