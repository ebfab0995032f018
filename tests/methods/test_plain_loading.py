"""Load brings back everything, first to last, and computes only what is missing then; compute leaves it all alone."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.methods.loading.base import Chunk, Decision, Outlook, Progress
from kvwise.methods.loading.compute import Compute
from kvwise.methods.loading.load import Load
from tests.methods.loading_simulator import BLOCK, Device, Guess, Link, Request, simulate

DEVICE = Device(alpha=1e-4, beta=1e-8)


def outlook(num_blocks: int = 8, first: int = 2, tiers: str = "d") -> Outlook:
    return Outlook(
        block_size=BLOCK,
        first=first,
        stop=first + num_blocks,
        num_tokens=(first + num_blocks) * BLOCK + 5,
        step_tokens=64,
        tiers=list((tiers * num_blocks)[:num_blocks]),
        num_bytes=[100] * num_blocks,
        seconds_to_compute=lambda start, stop: None,
        seconds_to_load=lambda tier, num_bytes: None,
        queued_s=lambda tier: 0.0,
    )


def progress(now: Outlook, arrived: str = "", failed: str = "", computed: int = 0) -> Progress:
    flags = [np.array([mark == "x" for mark in marks.ljust(now.stop - now.first)]) for marks in (arrived, failed)]
    return Progress(max(computed, now.first), *flags)


def test_chunks_go_first_to_last_past_what_is_there() -> None:
    now, method = outlook(8), Load(chunk=3 * BLOCK)
    assert method.next_chunk(now, progress(now)) == Chunk(2, 5)
    assert method.next_chunk(now, progress(now, "xxx")) == Chunk(5, 8)
    assert method.next_chunk(now, progress(now, "xxx", "   xx")) == Chunk(7, 10)
    assert method.next_chunk(now, progress(now, "x  x")) == Chunk(3, 5), "no chunk names what has arrived"
    assert method.next_chunk(now, progress(now, "xxxxxx", "      xx")) is None
    assert Load(chunk=1).next_chunk(now, progress(now)) == Chunk(2, 3), "at least a block"


def test_a_chunk_lies_in_one_tier() -> None:
    now = outlook(8, tiers="hhhddddd")
    assert Load().next_chunk(now, progress(now)) == Chunk(2, 5)
    assert Load().next_chunk(now, progress(now, "xxx")) == Chunk(5, 10)


def test_nothing_is_computed_before_all_has_come_or_failed() -> None:
    now = outlook(4)
    assert not Load().may_compute(now, progress(now))
    assert not Load().may_compute(now, progress(now, "xxx"))
    assert not Load().may_compute(now, progress(now, "", "x"))
    assert Load().may_compute(now, progress(now, "xxx", "   x"))
    assert Load().may_compute(now, replace(progress(now, "xx"), loading=False)), "given up"


@pytest.mark.parametrize(("num_blocks", "least", "decision"), [(4, 0, "load"), (4, 64, "load"), (4, 65, "compute")])
def test_a_short_prefix_is_left_alone(num_blocks: int, least: int, decision: str) -> None:
    assert Load(min_tokens=least).decide(outlook(num_blocks)) is Decision(decision)


def test_without_stored_blocks_all_is_computed() -> None:
    assert Load().decide(outlook(0)) is Decision.COMPUTE


@given(
    blocks=st.integers(1, 60), first=st.integers(0, 5), chunk=st.integers(1, 999), broken=st.sets(st.integers(0, 64))
)
def test_each_block_is_obtained_once(blocks: int, first: int, chunk: int, broken: set[int]) -> None:
    request = Request(Load(chunk=chunk), stop=first + blocks, first=first, broken=frozenset(broken))
    done = simulate(DEVICE, Link(1e5, 1e-3), request)
    fails = [first + index in broken for index in range(blocks)]
    assert done.num_loads == [int(not fail) for fail in fails]
    assert done.num_computes == [int(fail) for fail in fails]


def test_loading_takes_as_long_as_the_link_does() -> None:
    done = simulate(DEVICE, Link(1e5, latency_s=0.5), Request(Load(chunk=160), stop=100, block_bytes=1000))
    assert done.prefix_s == pytest.approx(10 * (0.5 + 0.1))


def test_over_a_dead_link_all_is_computed() -> None:
    done = simulate(DEVICE, Link(1e5, dead=True), Request(Load(), stop=100))
    assert done.num_computes == [1] * 100


def test_compute_stores_and_loads_nothing() -> None:
    now = outlook(4)
    assert Compute().codec is None
    assert Compute().decide(now) is Decision.COMPUTE
    assert Compute().next_chunk(now, progress(now)) is None
    assert Compute().may_compute(now, progress(now))
    done = simulate(DEVICE, Link(1e9), Request(Compute(), stop=100), Guess())
    assert done.num_computes == [1] * 100
    assert done.prefix_s == pytest.approx(DEVICE.seconds(0, 1600))


def test_loading_methods_know_no_tensors() -> None:
    code = (
        "import sys, pkgutil, importlib, kvwise.methods.loading as loading\n"
        "for module in pkgutil.iter_modules(loading.__path__):\n"
        "    importlib.import_module(f'{loading.__name__}.{module.name}')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
