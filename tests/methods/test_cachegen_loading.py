"""CacheGen's loading: each chunk at the best level that meets the target, else the lowest, else it is computed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.methods.loading.base import Chunk, Decision, Outlook, Progress
from kvwise.methods.loading.cachegen import CacheGen
from tests.methods.loading_simulator import Device, Guess, Link, Request, simulate

METHOD = CacheGen(ttft_ms=10_000, chunk=4 * 16)
SIZES = [400, 200, 100]


def outlook(num_blocks: int = 20, compute: float | None = None, after_s: float = 0.0) -> Outlook:
    """Blocks of three levels; `compute` seconds to compute a block, `after_s` the rest of the prompt."""

    def seconds(start: int, stop: int) -> float | None:
        if start >= num_blocks * 16:
            return after_s
        return None if compute is None else compute * (stop - start) / 16

    return Outlook(
        block_size=16,
        first=0,
        stop=num_blocks,
        num_tokens=num_blocks * 16 + 5,
        step_tokens=64,
        tiers=["disk"] * num_blocks,
        num_bytes=[SIZES[0]] * num_blocks,
        seconds_to_compute=seconds,
        seconds_to_load=lambda tier, num_bytes: None,
        queued_s=lambda tier: 0.0,
        levels=[("a", "b", "c")] * num_blocks,
        level_bytes=[SIZES] * num_blocks,
    )


def progress(now: Outlook, marks: str = "", per_byte: float = 0.0, elapsed: float = 0.0, computed: int = 0) -> Progress:
    """`marks`: x arrived, - failed, of the first blocks; the last chunk had 1,000 bytes at `per_byte` seconds each."""
    flags = [np.array([m == mark for m in marks.ljust(now.stop)]) for mark in "x-"]
    return Progress(computed, *flags, elapsed_s=elapsed, last_bytes=1000 if per_byte else 0, last_s=1000 * per_byte)


def level(now: Outlook, state: Progress, method: CacheGen = METHOD) -> int | None:
    chunk = method.next_chunk(now, state)
    assert chunk is not None
    return chunk.level


def test_the_codec_has_the_same_levels_and_mode() -> None:
    assert CacheGen().codec == "cachegen(levels=3, mode=paper)"
    assert CacheGen(levels=2, mode="released").codec == "cachegen(levels=2, mode=released)"


def test_the_first_chunk_comes_at_the_middle_level() -> None:
    now = outlook()
    assert METHOD.next_chunk(now, progress(now)) == Chunk(0, 4, level=1)
    assert METHOD.decide(now) is Decision.BOTH


@pytest.mark.parametrize(
    ("per_byte", "elapsed", "wanted"),
    [
        (10 / 6400, 0.0, 0),  # 16 blocks are left: 6,400, 3,200 or 1,600 bytes in 10 seconds
        (10.1 / 6400, 0.0, 1),
        (10 / 6400, 0.1, 1),
        (10 / 3200, 0.0, 1),
        (10.1 / 3200, 0.0, 2),
        (10 / 1600, 0.0, 2),
        (99.0, 0.0, 2),  # none is in time, and how long computing takes is unknown: the lowest
    ],
)
def test_all_that_is_left_counts_at_the_speed_of_the_previous_chunk(
    per_byte: float, elapsed: float, wanted: int
) -> None:
    now = outlook()
    assert level(now, progress(now, "xxxx", per_byte, elapsed)) == wanted


def test_computing_the_rest_of_the_prompt_is_part_of_the_time() -> None:
    now = outlook(after_s=4.0)
    assert level(now, progress(now, "xxxx", 6 / 6400)) == 0
    assert level(now, progress(now, "xxxx", 6.1 / 6400)) == 1


def test_the_request_s_own_target_comes_first_and_without_any_the_best_level() -> None:
    now = outlook()
    state = progress(now, "xxxx", 99.0)
    assert level(now, state, CacheGen(chunk=64)) == 0
    assert level(replace(now, ttft_target_s=1e9), state) == 0
    assert level(replace(now, ttft_target_s=0.1), state) == 2


def test_a_chunk_that_is_computed_sooner_is_passed_over_and_computed() -> None:
    """The lowest level would take 400 s for a chunk; computing a block takes 1 s, but 1,000 s from token 128 on."""
    now = outlook(compute=1.0)
    slow_at_the_end = replace(
        now, seconds_to_compute=lambda start, stop: (stop - start) / 16 * (1.0 if start < 128 else 1000.0)
    )
    state = progress(now, "xxxx", 1.0, computed=4)
    assert METHOD.next_chunk(slow_at_the_end, state) == Chunk(8, 12, level=2)
    assert not METHOD.may_compute(now, state), "the next chunk may be on its way"
    under_way = replace(state, under_way=Chunk(8, 12, level=2))
    assert METHOD.may_compute(now, under_way)
    assert METHOD.may_compute(now, progress(now, "xxxx    xxxx", 1.0, computed=4))
    assert not METHOD.may_compute(now, replace(under_way, computed=8)), "that one is coming"
    quick = replace(slow_at_the_end, ttft_target_s=1e9)
    assert METHOD.next_chunk(quick, progress(now, "xxxx    xxxx", 1.0, computed=4)) == Chunk(12, 16, level=0), (
        "what was passed over stays passed over"
    )


def test_where_computing_is_always_sooner_loading_ends() -> None:
    now = outlook(compute=0.001)
    state = progress(now, "xxxx", 1.0, computed=4)
    assert METHOD.next_chunk(now, state) is None
    assert METHOD.may_compute(now, replace(state, loading=False))


def test_what_failed_is_computed_and_not_tried_again() -> None:
    now = outlook()
    state = progress(now, "xx--", 1e-9, computed=2)
    assert METHOD.next_chunk(now, state) == Chunk(4, 8, level=0)
    assert METHOD.may_compute(now, state)
    assert METHOD.may_compute(now, replace(state, computed=20)), "the rest of the prompt"


def test_a_short_prefix_is_computed() -> None:
    now = outlook(20)
    assert CacheGen(min_tokens=320).decide(now) is Decision.BOTH
    assert CacheGen(min_tokens=321).decide(now) is Decision.COMPUTE
    assert CacheGen().decide(replace(now, stop=0)) is Decision.COMPUTE


def test_a_codec_without_levels_works_too() -> None:
    now = replace(outlook(), levels=(), level_bytes=())
    assert METHOD.next_chunk(now, progress(now)) == Chunk(0, 4, level=0)
    assert level(now, progress(now, "xxxx", 99.0)) == 0


@given(
    blocks=st.integers(1, 60),
    chunk=st.integers(1, 500),
    speed=st.floats(1e2, 1e8),
    target=st.floats(1e-3, 1e3),
    broken=st.frozensets(st.integers(0, 60)),
    told=st.sampled_from([Guess(), Guess(None), Guess(10.0), Guess(0.1)]),
)
@settings(deadline=None)
def test_it_always_ends_with_every_block_obtained(
    blocks: int, chunk: int, speed: float, target: float, broken: frozenset[int], told: Guess
) -> None:
    method = CacheGen(ttft_ms=target * 1e3, chunk=chunk)
    device = Device(1e-4, 1e-8, step_tokens=64)
    done = simulate(device, Link(speed, 1e-3), Request(method, stop=blocks, broken=broken), told)
    assert all(loads + computes >= 1 for loads, computes in zip(done.num_loads, done.num_computes, strict=True))
    assert max(done.num_loads) <= 1
    assert max(done.num_computes) <= 1
