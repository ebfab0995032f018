"""Cake: each block once, never later than the quicker side by more than what was begun last, whatever the guesses."""

import itertools
import statistics
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress
from kvwise.methods.loading.cake import Cake
from kvwise.methods.loading.compute import Compute
from kvwise.methods.loading.load import Load
from tests.methods.loading_simulator import BLOCK, Device, Guess, Learnt, Link, Request, Simulation, simulate

GUESSES = [Guess(*factors) for factors in itertools.product((0.1, 1.0, 10.0, None), repeat=2)]
GBPS = 1e9 / 8

# LongAlpaca-7B on an A100 (SYSTEMS of the paper: its figure 4): a step of 512 tokens takes 38.8 ms at the start and
# 112 ms after 32k; 512 KiB of KV per token; links of 7 to 100 Gbps; 12.5 to 100 % of the device.
ALPHA, BETA, TOKEN_BYTES = 7.58e-5, 4.36e-9, 512 * 1024
SPEEDS, LENGTHS, SHARES = (7, 25, 32, 56, 100), (4096, 8192, 12288, 16384), (0.125, 0.5, 1.0)


class Times(NamedTuple):
    """Seconds until the prefix was there: computing, loading, Cake; `unit`: the longer of one step and one chunk."""

    compute_s: float
    load_s: float
    cake_s: float
    unit: float

    @property
    def harmonic(self) -> float:
        return self.compute_s * self.load_s / (self.compute_s + self.load_s)

    @property
    def bound(self) -> float:
        return min(self.compute_s, self.load_s) + self.unit


@cache
def alone(method: Loading, device: Device, link: Link, stop: int, block_bytes: int) -> Request:
    """One side alone."""
    return simulate(device, link, Request(method, stop=stop, block_bytes=block_bytes))


def race(
    device: Device, link: Link, cake: Cake, told: Guess | Learnt, stop: int, block_bytes: int = 1000
) -> tuple[Times, Request]:
    """The three over the same link and device, and what Cake did."""
    compute = alone(Compute(), device, link, stop, block_bytes)
    load = alone(Load(chunk=cake.chunk), device, link, stop, block_bytes)
    both = simulate(device, link, Request(cake, stop=stop, block_bytes=block_bytes), told)
    assert compute.prefix_s is not None and load.prefix_s is not None and both.prefix_s is not None
    unit = max(compute.longest_step_s, load.longest_chunk_s)
    return Times(compute.prefix_s, load.prefix_s, both.prefix_s, unit), both


def require_once(request: Request, chunk: int) -> None:
    """Each block is loaded once or computed once, but for those of one chunk, which was in flight at the meeting."""
    assert max(request.num_loads) <= 1 and max(request.num_computes) <= 1
    twice = [i for i, n in enumerate(map(sum, zip(request.num_loads, request.num_computes, strict=True))) if n > 1]
    assert all(sum(pair) >= 1 for pair in zip(request.num_loads, request.num_computes, strict=True))
    assert not twice or twice[-1] - twice[0] < max(1, chunk // BLOCK)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Device, Link, Cake, int]:
    """A device, a link that is up to a thousand times quicker or slower, a method, and blocks stored."""
    num_blocks = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 30, 60, 120]))
    chunk = draw(st.sampled_from([16, 64, 128, 512]))
    share, step = draw(st.sampled_from([0.03, 0.125, 0.5, 1.0])), draw(st.sampled_from([16, 64, 256, 512, 2048]))
    device = Device(1e-4, draw(st.floats(0, 1e-7)), share, step)
    load_s = device.seconds(0, num_blocks * BLOCK) * 10 ** draw(st.floats(-3, 3))
    speed = num_blocks * 1000 / load_s
    latency = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0])) * chunk / BLOCK * 1000 / speed
    return device, Link(speed, latency), Cake(chunk=chunk, escape=draw(st.booleans())), num_blocks


@given(world=worlds(), told=st.sampled_from([*GUESSES, None]))
@settings(max_examples=400, deadline=None)
def test_it_is_never_later_than_the_quicker_side_whatever_is_guessed(
    world: tuple[Device, Link, Cake, int], told: Guess | None
) -> None:
    device, link, cake, num_blocks = world
    times, request = race(device, link, cake, told or Learnt(), stop=num_blocks)
    assert times.cake_s <= times.bound * (1 + 1e-9)
    require_once(request, cake.chunk)


@given(world=worlds(), told=st.sampled_from(GUESSES), data=st.data())
@settings(max_examples=200, deadline=None)
def test_it_ends_when_blocks_fail_and_the_link_changes_speed(
    world: tuple[Device, Link, Cake, int], told: Guess, data: st.DataObject
) -> None:
    device, link, cake, num_blocks = world
    broken = data.draw(st.frozensets(st.integers(0, num_blocks - 1)))
    total = num_blocks * 1000 / link.bytes_per_second
    changes = data.draw(st.lists(st.tuples(st.floats(0, total), st.floats(0.01, 100)), max_size=3))
    link = replace(link, changes=tuple(sorted(changes)))
    request = simulate(device, link, Request(cake, stop=num_blocks, broken=broken), told)
    require_once(request, cake.chunk)
    assert all(request.num_computes[block] == 1 and request.num_loads[block] == 0 for block in broken)


@given(world=worlds(), told=st.sampled_from(GUESSES))
@settings(max_examples=100, deadline=None)
def test_over_a_dead_link_all_is_computed_in_the_time_that_takes(
    world: tuple[Device, Link, Cake, int], told: Guess
) -> None:
    device, link, cake, num_blocks = world
    request = simulate(device, replace(link, dead=True, deadline_s=0.01), Request(cake, stop=num_blocks), told)
    assert request.num_computes == [1] * num_blocks
    assert request.prefix_s is not None
    # It may have waited for what never came, if it was told that this would be quick.
    waited = 0.0 if told.load is None or not cake.escape else device.seconds(0, num_blocks * BLOCK)
    assert request.prefix_s <= device.seconds(0, num_blocks * BLOCK) * (1 + 1e-9) + waited + num_blocks * 0.01


@given(worlds(), st.lists(st.integers(1, 60), min_size=2, max_size=5), st.sampled_from([*GUESSES, None]))
@settings(max_examples=150, deadline=None)
def test_several_at_once_share_link_and_device(
    world: tuple[Device, Link, Cake, int], lengths: list[int], told: Guess | None
) -> None:
    device, link, cake, _ = world

    def makespan(method: Loading, told: Guess | Learnt) -> tuple[float, list[Request]]:
        requests = [Request(method, stop=length) for length in lengths]
        done = Simulation(device, link, requests, told).run()
        return max(r.prefix_s or 0.0 for r in done), done

    alone_s = [makespan(method, Guess())[0] for method in (Compute(), Load(chunk=cake.chunk))]
    both_s, done = makespan(cake, told or Learnt())
    for request in done:
        require_once(request, cake.chunk)
    # Each of them may have begun one thing that was not needed, one after another on the one link or device.
    unit = max(max(r.longest_step_s for r in done), max(r.longest_chunk_s for r in done))
    assert both_s <= min(alone_s) + len(lengths) * unit + 1e-9


def grid(cake: Cake, told: Guess | Learnt) -> list[tuple[int, int, float, Times]]:
    """Five bandwidths, four lengths, three shares of the device."""
    rows = []
    for speed, length, share in itertools.product(SPEEDS, LENGTHS, SHARES):
        device, link = Device(ALPHA, BETA, share), Link(speed * GBPS, 1e-4)
        times, _ = race(device, link, cake, told, stop=length // BLOCK, block_bytes=TOKEN_BYTES * BLOCK)
        rows.append((speed, length, share, times))
    return rows


@pytest.mark.parametrize(
    "told", [Guess(), Guess(None, None), Guess(10.0, 0.1), Guess(0.1, 10.0), Guess(10.0, 10.0), "learnt"], ids=str
)
def test_the_grid_of_the_paper(told: Guess | str) -> None:
    guess = told if isinstance(told, Guess) else Learnt()
    rows = grid(Cake(), guess)
    assert statistics.median(t.cake_s / (1.10 * t.harmonic + t.unit) for *_, t in rows) <= 1
    assert max(t.cake_s / t.bound for *_, t in rows) <= 1
    if told == Guess():
        print(show(rows))
        assert statistics.median(t.cake_s / t.harmonic for *_, t in rows) <= 1.02, "even without the chunk"
        assert statistics.mean(t.compute_s / t.cake_s for *_, t in rows) > 2
        assert statistics.mean(t.load_s / t.cake_s for *_, t in rows) > 2
        assert min(min(t.compute_s, t.load_s) / t.cake_s for *_, t in rows) > 0.99, "it loses nowhere"


def show(rows: list[tuple[int, int, float, Times]]) -> str:
    """Time over Tc*Tl/(Tc+Tl), speed-up against loading \\ against computing."""
    lines = ["Gbps tokens share   cake s   /harmonic   vs load \\ vs compute"]
    lines += [
        f"{speed:4} {length:6} {share:5.3f} {t.cake_s:8.3f} {t.cake_s / t.harmonic:9.3f} "
        f"{t.load_s / t.cake_s:10.2f} \\ {t.compute_s / t.cake_s:.2f}"
        for speed, length, share, t in rows
    ]
    each = [t for *_, t in rows]
    lines.append(
        f"median /harmonic {statistics.median(t.cake_s / t.harmonic for t in each):.3f}, mean speed-up "
        f"{statistics.mean(t.load_s / t.cake_s for t in each):.2f} \\ "
        f"{statistics.mean(t.compute_s / t.cake_s for t in each):.2f}"
    )
    return "\n".join(lines)


def test_the_exceptions_save_what_the_plain_rule_loses() -> None:
    """Little of a slow device is free and the link is quick: the paper's rule ends behind plain loading."""
    plain, ours = grid(Cake(escape=False), Guess()), grid(Cake(), Guess())
    assert sum(t.cake_s > 1.005 * t.load_s for *_, t in plain) >= 5
    assert sum(t.cake_s > 1.005 * t.load_s for *_, t in ours) == 0


# -- single answers ---------------------------------------------------------------------------------------------


def outlook(compute: float | None, load: float | None, num_blocks: int = 100, tiers: str = "d") -> Outlook:
    """Seconds per block to compute and to load, steps of 8 blocks; None: unknown."""
    return Outlook(
        block_size=BLOCK,
        first=0,
        stop=num_blocks,
        num_tokens=num_blocks * BLOCK + 1,
        step_tokens=8 * BLOCK,
        tiers=list((tiers * num_blocks)[:num_blocks]),
        num_bytes=[100] * num_blocks,
        seconds_to_compute=lambda start, stop: None if compute is None else compute * (stop - start) / BLOCK,
        seconds_to_load=lambda tier, num_bytes: None if load is None else load * num_bytes / 100,
        queued_s=lambda tier: 0.0,
    )


def progress(
    now: Outlook, computed: int, arrived_from: int, compute: float = 0.0, load: float = 0.0, failed: int | None = None
) -> Progress:
    """Computed up to one block, arrived from another; what a block took to compute and to load (0: not measured)."""
    blocks = np.arange(now.first, now.stop)
    return Progress(
        computed, blocks >= arrived_from, blocks == failed, elapsed_s=1.0, last_bytes=800 if load else 0,
        last_s=8 * load, last_tokens=8 * BLOCK if compute else 0, last_step_s=8 * compute,
    )  # fmt: skip


def test_chunks_go_from_the_last_backward_until_the_pointers_meet() -> None:
    now = outlook(None, None)
    assert Cake().next_chunk(now, progress(now, 0, 100)) == Chunk(92, 100)
    assert Cake(chunk=64).next_chunk(now, progress(now, 40, 60)) == Chunk(56, 60)
    assert Cake().next_chunk(now, progress(now, 57, 60)) == Chunk(57, 60), "not what is computed"
    assert Cake().next_chunk(now, progress(now, 60, 60)) is None
    assert Cake().next_chunk(now, progress(now, 40, 60, failed=59)) == Chunk(51, 59), (
        "a block that failed is not tried again"
    )


def test_a_chunk_lies_in_one_tier() -> None:
    now = outlook(None, None, tiers="h" * 95 + "d" * 5)
    assert Cake().next_chunk(now, progress(now, 0, 100)) == Chunk(95, 100)
    assert Cake().next_chunk(now, progress(now, 0, 95)) == Chunk(87, 95)


@pytest.mark.parametrize(
    ("compute", "load", "decision"),
    [
        (1.0, 1.0, Decision.BOTH),
        (None, None, Decision.BOTH),
        (1.0, None, Decision.BOTH),
        (None, 1.0, Decision.BOTH),
        (1.0, 0.01, Decision.LOAD),  # all is loaded in the time of one block, and a step has eight
        (1.0, 0.09, Decision.BOTH),  # a step ends before all is loaded
        (1.0, 10000.0, Decision.COMPUTE),
        (1.0, 11.0, Decision.BOTH),  # a chunk comes after all is computed only if the guesses are right
    ],
)
def test_a_side_is_left_out_only_where_the_other_is_far_quicker(
    compute: float | None, load: float | None, decision: Decision
) -> None:
    assert Cake().decide(outlook(compute, load)) is decision
    assert Cake(escape=False).decide(outlook(compute, load)) is Decision.BOTH
    assert Cake().decide(replace(outlook(compute, load), stop=0)) is Decision.COMPUTE


def test_computing_waits_for_what_comes_before_a_step_would_end() -> None:
    now = outlook(5.0, 5.0)  # both guesses are wrong, and do not matter once both sides were measured
    late = progress(now, 84, 92, compute=1.0, load=0.9)
    assert not Cake().may_compute(now, late), "8 blocks: 7.2 s to load, 8 s to compute"
    assert Cake(escape=False).may_compute(now, late)
    assert Cake().may_compute(now, progress(now, 84, 92, compute=1.0, load=1.1))
    assert Cake().may_compute(now, progress(now, 80, 92, compute=1.0, load=0.9)), "a step ends before 12 blocks come"
    assert Cake().may_compute(now, progress(now, 88, 92, compute=0.8, load=0.9)), "a step ends where loading has got"
    assert Cake().may_compute(now, replace(late, loading=False))
    assert Cake().may_compute(now, progress(now, 84, 92, compute=1.0, load=0.9, failed=84)), "it must be computed"
    assert Cake().may_compute(now, progress(now, 92, 92, compute=1.0, load=0.9)), "all is there"


def test_a_chunk_that_hangs_ends_the_waiting() -> None:
    now = outlook(1.0, 1.0)
    late = progress(now, 84, 92, compute=1.0, load=0.9)
    assert not Cake().may_compute(now, replace(late, waited_s=7.0))
    assert Cake().may_compute(now, replace(late, waited_s=8.1)), "by now it should have come"


def test_loading_ends_when_computing_is_done_sooner() -> None:
    now = outlook(5.0, 5.0)
    assert Cake().next_chunk(now, progress(now, 84, 92, compute=1.0, load=1.1)) is None
    assert Cake().next_chunk(now, progress(now, 84, 92, compute=1.0, load=0.9)) == Chunk(84, 92)
    assert Cake().next_chunk(now, progress(now, 84, 92, load=1.1)) == Chunk(84, 92), "no step was measured"
    assert Cake(escape=False).next_chunk(now, progress(now, 84, 92, compute=1.0, load=1.1)) == Chunk(84, 92)


def test_the_queue_before_the_first_chunk_counts() -> None:
    now = outlook(1.0, 0.01)
    assert Cake().decide(replace(now, queued_s=lambda tier: 100.0)) is Decision.BOTH, "a step ends before"
    slow = outlook(0.01, 0.01)
    assert Cake().decide(slow) is Decision.BOTH
    assert Cake().decide(replace(slow, queued_s=lambda tier: 100.0)) is Decision.COMPUTE


def test_the_speed_of_one_tier_says_nothing_about_another() -> None:
    """What comes next lies on the quick tier; the chunk that has come was read from a slow one."""
    now = outlook(1.0, 0.1, tiers="h" * 92 + "d" * 8)
    late = replace(progress(now, 84, 92, compute=1.0, load=5.0), last_tier="d")
    assert not Cake().may_compute(now, late)
    assert Cake().may_compute(now, replace(late, last_tier="h"))
    assert Cake().may_compute(now, replace(late, last_tier=None)), "as if there were one tier only"


def test_chunks_of_several_tiers_add_up() -> None:
    now = outlook(1.0, 0.4, tiers="h" * 88 + "d" * 12)
    assert not Cake().may_compute(now, progress(now, 84, 92, compute=1.0)), "3.2 s to load, 8 s to compute"
    alternating = replace(now, tiers=list("hd" * 50), seconds_to_load=lambda tier, n: {"h": 10.0, "d": 0.1}[tier])
    assert Cake().may_compute(alternating, progress(now, 84, 92, compute=1.0))


def test_without_measurements_of_its_own_a_load_trusts_no_guess_alone() -> None:
    """Guesses that are ten times off, in opposite directions, keep neither side from its first attempt."""
    now = outlook(10.0, 0.1, num_blocks=4)
    assert not Cake().may_compute(now, replace(progress(now, 0, 4), elapsed_s=7.0)), "a tenth of computing, for now"
    assert Cake().may_compute(now, replace(progress(now, 0, 4), elapsed_s=8.0))
    slow = outlook(0.1, 10.0, num_blocks=4)
    assert Cake().next_chunk(slow, progress(slow, 0, 4)) == Chunk(0, 4)


def test_io_goes_on_while_nothing_of_the_device_is_free() -> None:
    now = outlook(1.0, 1.0, num_blocks=20)
    state, chunks = progress(now, 0, 20), []
    while (chunk := Cake().next_chunk(now, state)) is not None:
        chunks.append(chunk)
        state = progress(now, 0, chunk.start, load=1.0)
    assert chunks == [Chunk(12, 20), Chunk(4, 12), Chunk(0, 4)]


@pytest.mark.parametrize("factor", [1e3, 1e5])
def test_a_link_that_breaks_down_and_recovers_is_followed_within_twenty_requests(factor: float) -> None:
    """Once loading looks hopeless nothing is loaded, hence nothing measured: it is tried again all the same."""
    learnt, device = Learnt(), Device(1e-4, 1e-8)

    def serve(speed: float, count: int) -> list[Request]:
        done = []
        for _ in range(count):
            done.append(simulate(device, Link(speed, 1e-4), Request(Cake(), stop=100), learnt))
            if done[-1].decision is Decision.COMPUTE:
                learnt.link.skipped()
        return done

    def loaded(requests: list[Request]) -> list[float]:
        return [sum(request.num_loads) / 100 for request in requests]

    assert min(loaded(serve(1e7, 20))[5:]) > 0.9
    assert sum(loaded(serve(1e7 / factor, 20))[5:]) == 0
    assert min(loaded(serve(1e7, 25))[20:]) > 0.9
