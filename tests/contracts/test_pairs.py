"""What composes with what, cell by cell: allowed pairs serve a real model and both methods work, others say why not."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis, Method, Trait
from kvwise.core.strategy import conflict
from kvwise.methods.catalogue import catalogue, parse
from tests.contracts.played import (
    Played,
    line_of,
    play,
    require_same_answers,
    require_same_kept,
    require_work,
    small,
)

Serve = Callable[..., Any]
Pair = tuple[Method, Method]

CHOSEN = [small(kind.name) for kind in catalogue() if not kind.default]  # in the order of the axes
PAIRS = [(a, b) for a, b in combinations(CHOSEN, 2) if a.axis is not b.axis]
ALLOWED = [pair for pair in PAIRS if conflict(*pair) is None]
REFUSED = [pair for pair in PAIRS if conflict(*pair) is not None]

BY_PLACE = ("random", "streaming", "window")  # what these keep depends on nothing but positions
LOSSY = ("cachegen",)  # what it loads is not what was stored
BY_COMPUTED_ROWS = ("infinigen",)  # chooses by the queries of the rows that were computed, as its docstring says


def name_of(value: Method) -> str:
    return value.name


@pytest.fixture(scope="module")
def played_alone() -> dict[str, Played]:
    """Runs of single methods that pairs are compared with."""
    return {}


@pytest.fixture
def alone(serve: Serve, played_alone: dict[str, Played]) -> Callable[[Method], Played]:
    """`alone(method)`: what comes of the requests if nothing but this method is chosen."""

    def run(method: Method) -> Played:
        line = line_of(method)
        if line not in played_alone:
            played_alone[line] = play(serve, line)
        return played_alone[line]

    return run


def test_all_pairs_are_there(record_property: Callable[[str, int], None]) -> None:
    """How many cells the table has, and how many of either kind."""
    record_property("allowed", len(ALLOWED))
    record_property("refused", len(REFUSED))
    print(f"{len(PAIRS)} pairs: {len(ALLOWED)} allowed, {len(REFUSED)} refused")
    assert len(ALLOWED) + len(REFUSED) == len(PAIRS) == len(set(PAIRS))
    assert {axis for pair in PAIRS for axis in (pair[0].axis, pair[1].axis)} == set(Axis) - {Axis.DECODING}
    assert len(ALLOWED) > 150
    assert len(REFUSED) > 50


@pytest.mark.parametrize(("first", "second"), ALLOWED, ids=name_of)
def test_both_work_and_do_what_they_do_alone(
    serve: Serve, alone: Callable[[Method], Played], first: Method, second: Method
) -> None:
    played = play(serve, line_of(first, second))
    require_work(played, (first, second))
    for one, other in ((first, second), (second, first)):
        require_untouched(played, one, other, alone)


def require_untouched(played: Played, one: Method, other: Method, alone: Callable[[Method], Played]) -> None:
    """What `one` does although `other` is there too, as far as it must not make a difference."""
    sharing = other.name == "kvsharer"
    exact = not sharing and other.name not in LOSSY
    if one.axis is Axis.RETENTION and (exact or one.name in BY_PLACE):
        stored = played.engine.memory.layout.layers.stored
        require_same_kept(played, alone(one), stored if sharing else None)
    finds = other.axis is Axis.REUSE or (other.axis is Axis.LOADING and exact)
    if finds and one.axis is not Axis.REUSE and one.name not in (*LOSSY, *BY_COMPUTED_ROWS):
        # A rounding error of another chunk can turn a code into its neighbour.
        require_same_answers(played, alone(one), within=3e-2 if Trait.PACKS in one.traits else 1e-3)


@pytest.mark.parametrize(("first", "second"), REFUSED, ids=name_of)
def test_the_others_are_refused_with_their_reason(first: Method, second: Method) -> None:
    reason = conflict(first, second)
    assert reason is not None
    assert conflict(second, first) is not None
    for line in (f"{first}+{second}", f"{second}+{first}"):
        with pytest.raises(StrategyError) as caught:
            parse(line)
        assert str(caught.value) == f"{first.name} and {second.name} cannot work together: {reason}"
