"""A shelf brings the chosen rows to the front, fetches none that it holds, and keeps what it should: step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.engine.placement.shelf import Plan, Shelf


class Simulator:
    """Which rows lie on the device, head by head: those read by one of the last `keep` steps."""

    def __init__(self, num_heads: int, keep: int) -> None:
        self._steps: list[list[set[int]]] = []
        self._num_heads = num_heads
        self._keep = keep

    def read(self, chosen: list[list[int]], own: int | None) -> int:
        """How many rows were there already."""
        recent = self._steps[len(self._steps) - min(self._keep, len(self._steps)) :]
        there: list[set[int]] = [set().union(*(step[h] for step in recent)) for h in range(self._num_heads)]
        self._steps.append([set(row) | ({own} - {None}) for row in chosen])  # type: ignore[arg-type]
        return sum(len(there[h] & set(row)) for h, row in enumerate(chosen))


def carry_out(plan: Plan, slots: list[dict[int, int]]) -> int:
    """Do to real slots (slot -> row) what the plan says. Returns how many rows were fetched."""
    carried = [(h, into, slots[h][source]) for h, source, into in plan.moved.T.tolist()]
    writes = carried + [(h, into, row) for h, row, into in plan.fetched.T.tolist()]
    assert len({(h, into) for h, into, _ in writes}) == len(writes)  # no slot is written twice
    for head, into, row in writes:
        assert into < plan.num_slots
        slots[head][into] = row
    return plan.fetched.shape[1]


@given(
    num_heads=st.integers(1, 3), keep=st.integers(0, 4), with_own=st.booleans(), seed=st.integers(0, 10_000),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)  # fmt: skip
def test_what_is_read_is_there_and_only_the_rest_is_fetched(
    num_heads: int, keep: int, with_own: bool, seed: int, steps: list[int]
) -> None:
    random = np.random.default_rng(seed)
    shelf, simulator = Shelf(num_heads, keep), Simulator(num_heads, keep)
    slots: list[dict[int, int]] = [{} for _ in range(num_heads)]
    for step, num_read in enumerate(steps):
        chosen = np.stack([random.permutation(10 + step)[:num_read] for _ in range(num_heads)])
        own = 10 + step if with_own else None
        plan = shelf.plan(chosen, own)
        num_fetched = carry_out(plan, slots)
        assert plan.num_found == simulator.read(chosen.tolist(), own)
        assert num_fetched + plan.num_found == chosen.size
        for head in range(num_heads):
            if own is not None:
                slots[head][num_read] = own
            assert {slots[head][slot] for slot in range(num_read)} == set(chosen[head].tolist())
        assert plan.num_slots <= (keep + 1) * (max(steps) + 1) + 1


def test_a_row_that_stays_is_not_moved() -> None:
    shelf = Shelf(1, 1)
    shelf.plan(np.array([[4, 7, 9]]), own=10)
    plan = shelf.plan(np.array([[9, 2, 4]]), own=11)
    assert plan.moved.shape[1] == 0
    assert plan.fetched.tolist() == [[0], [2], [1]]  # in the place of row 7
    plan = shelf.plan(np.array([[9, 11, 4]]), own=12)  # the step's own row of before
    assert plan.moved.tolist() == [[0], [3], [1]]
    assert plan.fetched.shape[1] == 0


def test_a_shorter_reading_needs_fewer_slots() -> None:
    shelf = Shelf(2, 1)
    assert shelf.plan(np.arange(40)[None].repeat(2, 0)).num_slots == 41
    assert shelf.plan(np.array([[39, 1], [5, 38]])).num_slots == 3


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_rows_are_kept_as_long_as_asked(keep: int) -> None:
    shelf = Shelf(1, keep)
    shelf.plan(np.array([[1]]))
    for _ in range(keep - 1):
        shelf.plan(np.array([[2]]))
    assert shelf.plan(np.array([[1]])).num_found == (keep > 0)
    for _ in range(keep):
        shelf.plan(np.array([[3]]))
    assert shelf.plan(np.array([[1]])).num_found == 0
