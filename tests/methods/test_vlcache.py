"""VL-Cache keeps what the text behind the images attends to: against loops on random attention and running models."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvwise.core.errors import StrategyError
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.base import Spans
from kvwise.methods.retention.vlcache import VLCache
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.retention_views import kept_lists, prompt_view, random_attention
from tests.methods.test_refreekv import dense_attention
from tests.methods.vlcache_reference import plain_density, plain_first_row, plain_kept, plain_numbers

Serve = Callable[..., Any]
Load = Callable[[str], Any]

SHAPE = (4, 2)
LENGTHS = (45, 70, 9, 2, 33)
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 5}
UNCHUNKED = {"enable_chunked_prefill": False}


def uneven_attention(num_prompt: int, seed: int, num_outputs: int = 0) -> torch.Tensor:
    """Layers of which each is sparser than the one before."""
    layers = [
        random_attention(num_prompt, (1, SHAPE[1]), 2, seed + i, num_outputs=num_outputs, sharpness=0.5 + 1.5 * i)
        for i in range(SHAPE[0])
    ]
    return torch.cat(layers)


# -- the method alone -------------------------------------------------------------------------------------------


@given(
    num_prompt=st.integers(1, 80), num_outputs=st.integers(0, 4), budget=st.floats(0.01, 0.99),
    p=st.floats(0.001, 0.9), recent=st.floats(0, 1), observed=st.integers(1, 60), image=st.integers(0, 80),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_what_stays_equals_loops(
    num_prompt: int, num_outputs: int, budget: float, p: float, recent: float, observed: int, image: int, seed: int
) -> None:
    method = VLCache(budget, p, recent, observed=observed)
    spans: Spans = ((0, min(2, image)), (image // 2, image)) if 0 < image <= num_prompt else ()
    attention = uneven_attention(num_prompt, seed, num_outputs)
    view = prompt_view(method, num_prompt, SHAPE, num_outputs=num_outputs, attention=attention, spans=spans)
    kept = method.keep(view)
    assert kept.limit is None
    first_row = plain_first_row(num_prompt, spans, observed)
    assert method.observed_rows(num_prompt, spans) == num_prompt - first_row
    capacity = max(2, int(num_prompt * budget))
    rows = [layer[:, :, first_row:, :num_prompt].numpy() for layer in attention]
    expected = plain_kept(rows, num_prompt, capacity, first_row, p, recent)
    outputs = list(range(num_prompt, num_prompt + num_outputs))
    assert kept_lists(kept.mask) == [[head + outputs for head in layer] for layer in expected]
    assert sum(len(head) for layer in expected for head in layer) <= capacity * SHAPE[0] * SHAPE[1]


def test_sparser_layers_keep_fewer() -> None:
    method = VLCache(0.2, p=0.1)
    view = prompt_view(method, 200, SHAPE, attention=uneven_attention(200, 0))
    counts = method.keep(view).mask.sum(-1)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert counts[:, 0].tolist() == sorted(counts[:, 0].tolist(), reverse=True)
    assert len(set(counts[:, 0].tolist())) == 4
    assert 40 * 4 - 4 < int(counts[:, 0].sum()) <= 40 * 4


def test_layers_share_in_proportion_between_one_percent_and_all() -> None:
    method = VLCache(0.1)
    assert method._num_kept([7, 7, 7, 7, 7, 7], 100, 10) == [10] * 6
    assert method._num_kept([10, 20, 30, 40], 1000, 100) == [40, 80, 120, 160]
    assert method._num_kept([900, 100], 100, 60) == [100, 12]  # 108 of 100 tokens there are not: no renormalisation
    assert method._num_kept([1000, 1], 1000, 100) == [190, 10]  # what the 1 % costs is given back
    assert method._num_kept([1000, 1], 1000, 5) == [5, 5]  # 1 % is more than the budget
    for dense in ([900, 100], [1000, 1], [3, 5]):
        densities = [Fraction(d, 10_000) for d in dense]
        assert method._num_kept(dense, 100, 60) == plain_numbers(densities, 100, 60)


def test_only_rows_behind_the_last_image_observe() -> None:
    method = VLCache(observed=9)
    assert method.observed_rows(100, ((3, 20), (30, 88))) == 12
    assert method.observed_rows(100, ((3, 99),)) == 1
    assert method.observed_rows(100, ()) == 9
    assert method.observed_rows(100, ((3, 100),)) == 9  # nothing is behind it
    assert method.observed_rows(5, ()) == 5
    assert VLCache(observed=9, text=True).observed_rows(100, ((3, 20),)) == 9


def test_density_by_hand() -> None:
    rows = torch.tensor([[[[0.5, 0.3, 0.2, 0.0], [0.9, 0.04, 0.03, 0.03]]]]).numpy()
    assert plain_density(rows, 2, 0.05) == Fraction(3 + 1, 3 + 4)


def test_options_are_checked() -> None:
    for text, limit in {
        "budget=0": "above 0, at most 1",
        "p=0": "above 0, at most 1",
        "recent=1.1": "0 to 1",
        "observed=0": "at least 1",
    }.items():
        with pytest.raises(StrategyError, match=f"vlcache: {text} is out of range: it must be {limit}"):
            parse(f"vlcache({text})")


# -- on a running engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("model", ["llama-tiny", "gemma2-tiny", "gpt2-tiny"])
def test_kept_sets_equal_full_matrices_at_every_step(
    serve: Serve, load: Load, model: str, settings: dict[str, Any]
) -> None:
    method = VLCache(0.4, p=0.7, recent=0.2, observed=16)
    engine = serve(model, str(method), blocks=80, **settings)
    run(engine, prompts(*LENGTHS, seed=1), greedy(9))  # pages that others have used before
    many = prompts(*LENGTHS)
    expected = {}
    for prompt in many:
        first_row = plain_first_row(len(prompt), (), 16)
        rows = [layer[:, :, first_row:].numpy() for layer in dense_attention(load(model), prompt)]
        expected[len(prompt)] = plain_kept(rows, len(prompt), max(2, int(len(prompt) * 0.4)), first_row, 0.7, 0.2)
    assert len({len(layer[0]) for layer in expected[70]}) > 1  # layers differ
    names = [engine.add_request(p, greedy(20)) for p in many]
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                generated = list(range(sequence.num_prompt, sequence.num_computed))
                found = engine.memory.placement.kept_positions(sequence)
                assert found == [[head + generated for head in layer] for layer in expected[sequence.num_prompt]]
                checked += 1
    assert checked == len(LENGTHS) * 19
    require_empty(engine)


def test_pages_are_really_freed_within_one_page_per_head_of_the_budget(serve: Serve) -> None:
    engine = serve("llama-tiny", "vlcache(budget=0.2, p=0.7)", blocks=60)
    engine.add_request(prompts(320)[0], greedy(4), request_id="a")
    engine.step()
    layout, usage = engine.memory.layout, engine.memory.cache.usage()
    heads = layout.pages_per_block
    kept = engine.memory.placement.kept_positions(sequence_of(engine, "a"))
    assert usage.num_pages_held == sum(layout.num_blocks_for(len(h) + 1) for layer in kept for h in layer)
    assert usage.num_pages_held <= 320 * 0.2 / layout.block_size * heads + heads
    finish(engine)
    require_empty(engine)
