"""Elastic Cache keeps, merges and lets go what its description says, at every layer and head of running models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.methods.retention.base import Kept
from kvwise.methods.retention.elastic import Elastic
from kvwise.methods.retention.merging import nearest
from tests.engine.runs import greedy, prompts, require_empty, run, sequence_of
from tests.methods.elastic_reference import PlainElastic, plain_kept, plain_merged, plain_nearest, released
from tests.methods.following import CHUNKED, UNCHUNKED, follow
from tests.methods.retention_views import decode_view, kept_lists, prompt_view, victims

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-5


def tensors(num_tokens: int, seed: int, shape: tuple[int, int] = (3, 2), dim: int = 5) -> tuple[Tensor, Tensor]:
    """Mass [L, H, T] and rows [L, H, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, num_tokens, generator=generator), torch.randn(
        *shape, num_tokens, dim, generator=generator
    )


def mixed(kept: Kept, rows: Tensor) -> Tensor:
    """Rows [L, H, T, D] with what is merged into them."""
    if kept.merge is None:
        return rows
    assert torch.equal(kept.merge.key_weights, kept.merge.value_weights)
    weighted = rows * kept.merge.key_weights[..., None]
    return torch.zeros_like(rows).scatter_add_(2, kept.merge.target[..., None].expand_as(rows), weighted)


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(
    ("model", "budget", "sinks", "distance"),
    [
        ("llama-tiny", 0.4, 4, 25),  # 28 kept of 70: three for good, and the sinks
        ("llama-tiny", 0.5, 4, 6),
        ("mistral-tiny", 0.4, 2, 5),  # a window of 8
        ("gemma2-tiny", 0.4, 0, 9),
        ("gpt2-tiny", 0.2, 4, 25),
    ],
)
def test_a_running_model_holds_what_the_reference_holds(
    serve: Serve, load: Load, model: str, budget: float, sinks: int, distance: int, settings: dict[str, Any]
) -> None:
    rules = [PlainElastic(budget, sinks, distance) for _ in range(4)]
    engine = serve(model, f"elastic(budget={budget}, sinks={sinks}, distance={distance})", blocks=400, **settings)
    follow(engine, load(model), rules, (26, 45, 70, 33), num_decoded=20)
    assert min(rule.margin for rule in rules) > ROUNDING, "choose another seed: rounding would decide"


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6, 23, 57])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("image", [None, (6, 20), (2, 50)])
@pytest.mark.parametrize("text", [False, True])
def test_kept_and_merged_equal_the_reference(
    num_tokens: int, budget: float, sinks: int, image: tuple[int, int] | None, text: bool
) -> None:
    if image is not None and image[1] > num_tokens:
        image = None
    method = Elastic(budget, sinks=sinks, text=text)
    mass, rows = tensors(num_tokens, num_tokens)
    view = prompt_view(method, num_tokens, (3, 2), mass=mass, spans=() if image is None else (image,))
    kept, found = method.keep(view), kept_lists(method.keep(view).mask)
    mixture = mixed(kept, rows)
    capacity = max(sinks + 1, int(num_tokens * budget))
    for layer in range(3):
        of_image = None if image is None or text else range(*image)
        expected = plain_kept(mass[layer].mean(0).tolist(), capacity, sinks, of_image)
        for head in range(2):
            assert found[layer][head] == expected
            plain = torch.stack(plain_merged(expected, list(rows[layer, head])))
            torch.testing.assert_close(mixture[layer, head, expected], plain)
    assert (kept.merge is None) == (num_tokens <= capacity)


def test_only_image_tokens_are_dropped_as_long_as_the_budget_allows_it() -> None:
    method = Elastic(0.5)
    mass, _ = tensors(60, 0)
    kept = method.keep(prompt_view(method, 60, (3, 2), mass=mass, spans=((5, 25), (30, 50)))).mask
    text = torch.ones(60, dtype=torch.bool)
    text[5:25] = text[30:50] = False
    assert bool(kept[..., text].all())
    assert kept.sum(-1).unique().tolist() == [30]
    everything = Elastic(0.5, text=True)
    kept = everything.keep(prompt_view(everything, 60, (3, 2), mass=mass, spans=((5, 25), (30, 50)))).mask
    assert not bool(kept[..., text].all())


def test_nearest_takes_the_earlier_of_two() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        kept = torch.from_numpy(rng.random(30) < 0.2)
        kept[int(rng.integers(30))] = True
        expected = [plain_nearest(kept.nonzero().flatten().tolist(), t) for t in range(30)]
        assert nearest(kept).tolist() == expected
    assert nearest(torch.tensor([True, False, True])).tolist() == [0, 0, 2]


@pytest.mark.parametrize(("num_tokens", "budget"), [(40, 0.5), (57, 0.3), (33, 0.8)])
def test_the_released_mode_repeats_the_slips(num_tokens: int, budget: float) -> None:
    method = Elastic(budget, mode="released")
    mass, rows = tensors(num_tokens, 3)
    kept = method.keep(prompt_view(method, num_tokens, (3, 2), mass=mass))
    forgotten = num_tokens - int(num_tokens * budget)
    mixture = mixed(kept, rows)
    differs = False
    best = Elastic(budget)
    paper = best.keep(prompt_view(best, num_tokens, (3, 2), mass=mass)).mask
    for layer in range(3):
        for head in range(2):
            expected, plain = released(mass[layer].sum(0), rows[layer, head], forgotten, 4)
            assert kept.mask[layer, head].nonzero().flatten().tolist() == expected
            assert len(expected) == int(num_tokens * budget) - 1
            torch.testing.assert_close(mixture[layer, head, expected], plain)
            differs |= bool((kept.mask[layer, head] & ~paper[layer, head]).any())
    assert differs


@pytest.mark.parametrize(("distance", "limit"), [(3, 8), (25, 8), (7, 8)])
def test_the_token_at_the_fixed_index_leaves(distance: int, limit: int) -> None:
    """Step by step, in slots that are written over."""
    method = Elastic(limit / 40, sinks=2, distance=distance)
    mass, _ = tensors(40, 1, (1, 1))
    kept = method.keep(prompt_view(method, 40, (1, 1), mass=mass))
    assert kept.marks is not None
    slots = kept.mask[0, 0].nonzero().flatten().tolist()
    plain = list(slots)
    slots.append(40)
    for token in range(40, 60):
        plain.append(token)
        del plain[max(2, limit - distance)]
        view = decode_view(
            torch.tensor(slots, dtype=torch.int32).view(1, 1, 1, -1), torch.ones(1, 1, 1, limit + 1, dtype=torch.bool),
            [token + 1], [limit], marks=[int(kept.marks)],
        )  # fmt: skip
        victim = int(victims(method, view))
        slots[victim] = token + 1
        assert sorted(slots)[:-1] == plain


def test_a_budget_that_drops_nothing_answers_as_full(serve: Serve) -> None:
    """Prompts of at most the sinks and one, and outputs that end before the limit."""
    many = prompts(2, 3)
    ours = run(serve("llama-tiny", "elastic(budget=0.9, sinks=30)"), many, greedy(20))
    theirs = run(serve("llama-tiny", "full"), many, greedy(20))
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]


def test_what_was_merged_is_told(serve: Serve) -> None:
    engine = serve("llama-tiny", "elastic(budget=0.25)", blocks=60)
    engine.add_request(prompts(80)[0], greedy(4), request_id="a")
    engine.step()
    told = sequence_of(engine, "a").attestation
    assert told.tokens_merged == 60 * engine.memory.layout.pages_per_block
    assert told.tokens_dropped == 0
    while engine.has_unfinished():
        engine.step()
    require_empty(engine)
