"""ReFreeKV drops what the last row can do without: against loops on random attention and on running models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvwise.core.errors import StrategyError
from kvwise.core.method import Trait
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.refreekv import ReFreeKV
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.dense_reference import Dense
from tests.methods.refreekv_reference import plain_cut, plain_order
from tests.methods.retention_views import kept_lists, prompt_view, random_attention

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-6  # losses closer to the threshold than this would be rounding's
SHAPE = (2, 3)
LENGTHS = (45, 70, 9, 3, 33)
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 5}
UNCHUNKED = {"enable_chunked_prefill": False}
RANKINGS = pytest.mark.parametrize("ranking", ["streaming", "h2o", "snapkv"])


def expected_kept(attention: torch.Tensor, method: ReFreeKV, num_prompt: int) -> tuple[list[list[list[int]]], float]:
    """Positions by layer and head from full matrices [L, H, G, n, n], and the closest decision."""
    options = {"window": method.window, "kernel": method.kernel, "sinks": method.sinks}
    kept, margin = [], np.inf
    for layer in attention.numpy():
        observed = layer[:, :, max(0, num_prompt - method.window) :]
        orders = [
            plain_order(method.ranking, num_prompt, mass=head.sum((0, 1)), rows=rows, **options)
            for head, rows in zip(layer, observed, strict=True)
        ]
        dropped, close = plain_cut(layer[:, :, -1], orders, method.threshold)
        kept.append([[t for t in range(num_prompt) if t not in gone] for gone in dropped])
        margin = min(margin, close)
    return kept, margin


# -- the method alone -------------------------------------------------------------------------------------------


@RANKINGS
@given(
    num_prompt=st.integers(1, 60), num_outputs=st.integers(0, 4), threshold=st.floats(0.001, 0.9),
    window=st.integers(1, 20), sinks=st.integers(0, 6), seed=st.integers(0, 9),
)  # fmt: skip
def test_what_stays_equals_loops(
    ranking: str, num_prompt: int, num_outputs: int, threshold: float, window: int, sinks: int, seed: int
) -> None:
    method = ReFreeKV(threshold, ranking, window, kernel=3, sinks=sinks)
    attention = random_attention(num_prompt, SHAPE, 2, seed, num_outputs=num_outputs)
    mass = attention.sum((2, 3)) if method.needs_mass else None
    view = prompt_view(method, num_prompt, SHAPE, num_outputs=num_outputs, attention=attention, mass=mass)
    kept = method.keep(view)
    assert kept.limit is None
    expected, margin = expected_kept(attention[..., :num_prompt], method, num_prompt)
    if margin > 1e-12:
        outputs = list(range(num_prompt, num_prompt + num_outputs))
        assert kept_lists(kept.mask) == [[head + outputs for head in layer] for layer in expected]
    assert all(len({len(head) for head in layer}) == 1 for layer in kept_lists(kept.mask))  # heads share the length


def test_a_cut_by_hand() -> None:
    """Attention 0.8, 0.6 and nothing else: without the second the norm falls from 1 to 0.8."""
    row = torch.zeros(1, 1, 1, 10, 10)
    row[..., -1, 7], row[..., -1, 4] = 0.8, 0.6
    kept = {}
    for threshold in (0.19, 0.21):
        method = ReFreeKV(threshold, "streaming", sinks=2)
        kept[threshold] = kept_lists(method.keep(prompt_view(method, 10, (1, 1), attention=row)).mask)[0][0]
    assert kept == {0.19: [0, 1, 4, 5, 6, 7, 8, 9], 0.21: [0, 1, 7, 8, 9]}


def test_the_norm_is_a_mean_over_query_heads_that_lose_the_same_tokens() -> None:
    """Two query heads of one KV head: one loses 0.2 of its norm, the other nothing, so that 0.1 is lost."""
    row = torch.zeros(1, 1, 2, 10, 10)
    row[:, :, 0, -1, 7], row[:, :, 0, -1, 4], row[:, :, 1, -1, 8] = 0.8, 0.6, 1.0
    for threshold, first in ((0.09, 4), (0.11, 7)):
        method = ReFreeKV(threshold, "streaming", sinks=0)
        kept = kept_lists(method.keep(prompt_view(method, 10, (1, 1), attention=row)).mask)[0][0]
        assert kept == list(range(first, 10))


def test_at_threshold_0_nothing_is_dropped() -> None:
    method = ReFreeKV(0.0, "streaming", sinks=0)
    row = torch.zeros(1, 2, 2, 10, 10)
    row[..., -1, 7] = 1.0
    assert not method.drops
    assert method.keep(prompt_view(method, 10, (1, 2), attention=row)).mask.all()


def test_rows_are_needed_as_the_ranking_says() -> None:
    assert Trait.NEEDS_EVERY_ROW in ReFreeKV(ranking="h2o").traits
    assert Trait.NEEDS_EVERY_ROW not in ReFreeKV(ranking="snapkv").traits | ReFreeKV().traits
    assert [ReFreeKV(ranking=r).needs_mass for r in ("streaming", "h2o", "snapkv")] == [False, True, False]
    assert [ReFreeKV(ranking=r).observed_rows(50) for r in ("streaming", "h2o", "snapkv")] == [1, 1, 32]
    with pytest.raises(StrategyError, match="refreekv and prefix cannot work together"):
        parse("refreekv(ranking=h2o)+prefix")


def test_options_are_checked() -> None:
    for text, limit in {
        "threshold=1": "at least 0, below 1",
        "threshold=-0.1": "at least 0, below 1",
        "ranking=best": "one of streaming, h2o, snapkv",
        "window=0": "at least 1",
        "kernel=0": "at least 1",
        "sinks=-1": "0 or more",
    }.items():
        with pytest.raises(StrategyError, match=f"refreekv: {text} is out of range: it must be {limit}"):
            parse(f"refreekv({text})")


# -- on a running engine ----------------------------------------------------------------------------------------


def dense_attention(loaded: Any, prompt: list[int]) -> torch.Tensor:
    """[L, H, G, n, n] from full matrices."""
    dense = Dense(loaded)
    dense.step(prompt)
    layers = [dense.weights[layer] for layer in range(loaded.num_layers)]
    return torch.stack(layers).unflatten(1, (loaded.num_kv_heads, -1))


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("model", ["llama-tiny", "gemma2-tiny", "gpt2-tiny"])
@RANKINGS
def test_kept_sets_equal_full_matrices_at_every_step(
    serve: Serve, load: Load, model: str, ranking: str, settings: dict[str, Any]
) -> None:
    method = ReFreeKV(0.2, ranking, window=8, kernel=3)
    engine = serve(model, str(method), blocks=80, **settings)
    run(engine, prompts(*LENGTHS, seed=1), greedy(9))  # pages that others have used before
    many = prompts(*LENGTHS)
    expected = {}
    for prompt in many:
        expected[len(prompt)], margin = expected_kept(dense_attention(load(model), prompt), method, len(prompt))
        assert margin > ROUNDING, "choose another seed: rounding would decide"
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


@RANKINGS
def test_threshold_0_is_full_to_the_token(serve: Serve, ranking: str) -> None:
    many = prompts(*LENGTHS)
    full = run(serve("llama-tiny", "full"), many, greedy(12))
    outputs = run(serve("llama-tiny", f"refreekv(threshold=0, ranking={ranking})", **CHUNKED), many, greedy(12))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in full]
    assert all(o.attestation.tokens_dropped == 0 for o in outputs)


def test_pages_are_really_freed(serve: Serve) -> None:
    engine = serve("llama-tiny", "refreekv(threshold=0.3)", blocks=60)
    engine.add_request(prompts(320)[0], greedy(4), request_id="a")
    engine.step()
    layout = engine.memory.layout
    kept = engine.memory.placement.kept_positions(sequence_of(engine, "a"))
    most = sum(layout.num_blocks_for(len(head) + 1) for layer in kept for head in layer)
    assert engine.memory.cache.usage().num_pages_held == most < 20 * layout.pages_per_block
    finish(engine)
    require_empty(engine)
