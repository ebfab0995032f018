"""Layerwise loads layer after layer and starts to compute as early as no layer has to wait."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.methods.loading.base import Chunk, Decision, Outlook, Progress
from kvwise.methods.loading.layerwise import Layerwise

METHOD = Layerwise()


def outlook(num_layers: int = 8, step_s: float | None = 8.0, num_blocks: int = 6) -> Outlook:
    """Blocks [2, 8) in two tiers; a step of 64 tokens after them takes `step_s`."""
    return Outlook(
        block_size=16,
        first=2,
        stop=2 + num_blocks,
        num_tokens=(2 + num_blocks) * 16 + 64,
        step_tokens=64,
        tiers=["host", "disk"] * (num_blocks // 2),
        num_bytes=[800] * num_blocks,
        seconds_to_compute=lambda start, stop: None if step_s is None else step_s * (stop - start) / 64,
        seconds_to_load=lambda tier, num_bytes: 1.0,
        queued_s=lambda tier: 0.0,
        num_layers=num_layers,
    )


def progress(now: Outlook, layers: int, layer_s: float, failed: int | None = None) -> Progress:
    blocks = np.arange(now.first, now.stop)
    return Progress(
        now.first, np.full(len(blocks), layers == now.num_layers), blocks == failed, layers=layers,
        last_bytes=600 if layers else 0, last_s=layer_s,
    )  # fmt: skip


def test_a_chunk_is_a_layer_of_all_blocks() -> None:
    now = outlook(num_layers=3)
    asked = [METHOD.next_chunk(now, progress(now, layers, 1.0)) for layers in range(4)]
    assert asked == [Chunk(2, 8, layer=0), Chunk(2, 8, layer=1), Chunk(2, 8, layer=2), None]
    assert METHOD.by_layer
    assert METHOD.look_ahead == 8
    assert METHOD.decide(now) is Decision.LOAD
    assert METHOD.decide(replace(now, stop=2)) is Decision.COMPUTE


def test_what_stands_behind_a_block_that_failed_is_computed() -> None:
    now = outlook(num_layers=3)
    assert METHOD.next_chunk(now, progress(now, 1, 1.0, failed=5)) == Chunk(2, 5, layer=1)
    assert METHOD.next_chunk(now, progress(now, 0, 1.0, failed=2)) is None
    assert METHOD.may_compute(now, progress(now, 0, 1.0, failed=2))


@given(
    num_layers=st.integers(1, 60), layers=st.integers(0, 60), layer_s=st.floats(0.001, 10), step_s=st.floats(0.001, 100)
)
def test_computing_starts_as_soon_as_no_layer_waits(
    num_layers: int, layers: int, layer_s: float, step_s: float
) -> None:
    layers = min(layers, num_layers)
    now = outlook(num_layers, step_s)
    waits = [
        (layer - layers + 1) * layer_s > layer * step_s / num_layers for layer in range(layers, num_layers)
    ]  # layer after layer, by hand
    assert METHOD.may_compute(now, progress(now, layers, layer_s)) == (not any(waits))


@pytest.mark.parametrize(("layers", "may"), [(0, False), (3, False), (4, True), (8, True)])
def test_loading_runs_ahead_by_as_many_layers_as_it_takes(layers: int, may: bool) -> None:
    """A layer loads in 1.75 s and computes in 1 s: with four in hand the last comes after 4 * 1.75 = 7 s."""
    now = outlook(8, 8.0)
    assert METHOD.may_compute(now, progress(now, layers, 1.75)) is may


def test_everything_is_loaded_first_while_the_speed_of_prefill_is_unknown() -> None:
    now = outlook(8, None)
    assert [METHOD.may_compute(now, progress(now, layers, 0.001)) for layers in (0, 4, 7, 8)] == [False] * 3 + [True]
    given_up = replace(progress(now, 4, 0.001), loading=False)
    assert METHOD.may_compute(now, given_up)


def test_a_layer_that_is_late_counts_as_it_has_turned_out() -> None:
    now = outlook(8, 8.0)
    assert METHOD.may_compute(now, progress(now, 4, 1.0))
    assert not METHOD.may_compute(now, replace(progress(now, 4, 1.0), waited_s=2.0))


def test_only_the_first_step_has_to_find_its_layers_in_time() -> None:
    """The rest of the prompt is shorter than a step: its own time counts."""
    now = replace(outlook(8, 8.0), num_tokens=8 * 16 + 8)
    assert not METHOD.may_compute(now, progress(now, 4, 1.0)), "8 tokens take 1 s, a layer of them an eighth"
    assert METHOD.may_compute(now, progress(now, 4, 0.1))
