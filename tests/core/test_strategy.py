"""A strategy is a value: it prints, parses back, hashes, and lives in TOML."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.methods.catalogue import parse

LINES = [
    "full",
    "prefix",
    "h2o",
    "h2o(budget=0.3, recent=0.75)",
    "streaming(window=64)+prefix",
    "infinigen(budget=0.1, alpha=5)+prefix",
    "infinigen(alpha=1e+09, budget=1, ratio=1)",
]


@pytest.mark.parametrize("line", LINES)
def test_printing_and_parsing_are_inverse(line: str) -> None:
    strategy = parse(line)
    assert parse(str(strategy)) == strategy
    assert str(parse(str(strategy))) == str(strategy)


@pytest.mark.parametrize("line", LINES)
def test_toml_round_trip(line: str) -> None:
    strategy = parse(line)
    assert parse(tomllib.loads(strategy.to_toml())["strategy"]) == strategy


def test_equal_strategies_are_one_key() -> None:
    table = {parse(line): line for line in LINES}
    assert len(table) == len(LINES)
    assert table[parse("h2o(recent=0.75,budget=0.30)")] == "h2o(budget=0.3, recent=0.75)"
    assert parse("h2o(budget=0.2)") == parse("h2o")
    assert parse("h2o(budget=0.2)") != parse("h2o(budget=0.21)")
    assert parse("full") == parse("full+all+native+none+compute+one")


def test_only_what_differs_from_the_default_is_printed() -> None:
    assert str(parse("h2o(budget=0.2, recent=0.5)+none")) == "h2o"
    assert str(parse("full+prefix")) == "prefix"


@given(budget=st.floats(1e-6, 1, exclude_min=True), recent=st.floats(0, 1))
def test_any_budget_survives_being_printed(budget: float, recent: float) -> None:
    """What a result records must name the very strategy that ran."""
    strategy = parse(f"h2o(budget={budget!r}, recent={recent!r})")
    assert parse(str(strategy)) == strategy
