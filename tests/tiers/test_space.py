"""Room in an arena: every byte free or taken, whatever fits by its size is given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.core.errors import InvariantError
from kvwise.tiers.record import padded
from kvwise.tiers.space import Run, Space


def size_of(runs: list[Run]) -> int:
    return sum(stop - start for start, stop in runs)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1500), st.integers(0, 99)), max_size=60))
def test_random_takes_and_returns(steps: list[tuple[bool, int, int]]) -> None:
    space, taken = Space(4096), []
    for take, num_bytes, which in steps:
        if take:
            free = space.num_free
            runs = space.take(num_bytes)
            assert (runs is None) == (padded(num_bytes) > free)  # what fits by its size fits
            if runs is not None:
                assert size_of(runs) == padded(num_bytes)
                taken.append(runs)
        elif taken:
            space.give_back(taken.pop(which % len(taken)))
        space.check(run for runs in taken for run in runs)
    space.give_back(run for runs in taken for run in runs)
    space.check([])
    assert space.take_run(4096) == (0, 4096)  # all neighbours have become one run again


def test_requests_of_one_size_always_get_one_run() -> None:
    rng, space = np.random.default_rng(0), Space(100 * 640)
    taken = [space.take(640) for _ in range(100)]
    assert space.take(1) is None
    for _ in range(30):
        order = rng.permutation(100)
        for index in order[:40]:
            space.give_back(taken[index])
        for index in order[:40]:
            taken[index] = space.take(600)
    assert all(len(runs) == 1 for runs in taken)
    space.check(run for runs in taken for run in runs)


def test_the_shortest_run_that_is_long_enough_is_taken() -> None:
    space = Space(64 * 10)
    runs = [space.take_run(64 * n) for n in (1, 4, 1, 2, 2)]
    space.give_back([runs[1], runs[3]])
    assert space.take_run(64 * 2) == runs[3]
    assert space.take_run(64 * 3) == (runs[1][0], runs[1][0] + 64 * 3)
    assert space.take_run(64 * 2) is None
    assert space.take_run(0) is None


def test_what_finds_no_run_gets_the_longest_ones() -> None:
    space = Space(64 * 6)
    runs = [space.take_run(64) for _ in range(6)]
    space.give_back([runs[0], runs[2], runs[3], runs[5]])
    assert space.take(64 * 4) == [(128, 256), (320, 384), (0, 64)]
    assert space.num_free == 0


def test_check_finds_what_is_lost_or_given_twice() -> None:
    space = Space(640)
    run = space.take(100)
    assert run is not None
    space.check(run)
    with pytest.raises(InvariantError, match="lost, or in two places"):
        space.check([])
    with pytest.raises(InvariantError, match="lost, or in two places"):
        space.check([*run, *run])
    space.num_free -= 64
    with pytest.raises(InvariantError, match="are said to be free"):
        space.check(run)
