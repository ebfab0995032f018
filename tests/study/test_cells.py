"""Cells: every combination once, named by all it depends on, in an order that spreads noise."""

import math

from kvwise.study.cells import CellKind, expand, framework_of
from tests.study.conftest import PLAN, make_plan


def test_strategies_without_a_budget_are_run_once() -> None:
    live = [c for c in expand(make_plan()) if c.kind is CellKind.LIVE and c.block == "main" and c.repeat == 0]
    assert len(live) == 2 * 2 * (1 + 2 + 2)
    assert {c.label for c in live} == {"full+prefix", "h2o 50%", "h2o 10%", "infinigen 50%", "infinigen 10%"}
    assert {c.strategy for c in live if c.budget == 0.1} == {"h2o(budget=0.1)", "infinigen(budget=0.1)"}


def test_repeats_are_outermost_and_strategies_innermost_with_another_one_first_in_each() -> None:
    live = [c for c in expand(make_plan()) if c.kind is CellKind.LIVE and c.block == "main"]
    assert [c.repeat for c in live] == sorted(c.repeat for c in live)
    groups = [live[i : i + 5] for i in range(0, len(live), 5)]
    assert all(len({(c.model, c.rate, c.repeat) for c in group}) == 1 for group in groups)
    assert groups[0][0].strategy != groups[-1][0].strategy


def test_ids_are_unique_stable_and_depend_on_what_is_measured() -> None:
    cells = expand(make_plan())
    assert len({c.id for c in cells}) == len(cells)
    assert [c.id for c in expand(make_plan())] == [c.id for c in cells]
    other = expand(make_plan(PLAN.replace("duration_s = 1.0", "duration_s = 2.0")))
    same = {c.id for c in cells} & {c.id for c in other}
    assert {c.block for c in cells if c.id not in same} == {"main"}
    seeded = expand(make_plan("seed = 5\n" + PLAN))
    assert not {c.id for c in cells} & {c.id for c in seeded}


def test_blocks_that_ask_the_same_prompts_share_the_agreement() -> None:
    text = PLAN.replace("context_lengths = [256]", "context_lengths = [128]").replace('"hungry"', '"full+prefix"')
    quality = [c for c in expand(make_plan(text)) if c.kind is CellKind.QUALITY]
    assert len(quality) == 2 * 5 + 2  # only `full` and `h2o 20%` of the second block are new


def test_axes_turn_into_plain_values() -> None:
    cells = [c for c in expand(make_plan()) if c.block == "memory"]
    assert {(c.rate, c.concurrency, c.memory) for c in cells} == {
        (math.inf, n, m) for n in (2, 4) for m in ("512 tokens", "64MiB")
    }
    assert {c.load_text() for c in cells} == {"2 at a time", "4 at a time"}


def test_the_framework_is_the_strategy_without_its_budget() -> None:
    assert framework_of("h2o(budget={budget})") == "h2o"
    assert framework_of("h2o(budget=0.25)") == "h2o"
    assert framework_of("h2o(budget={budget}, recent=0.3)+x") == "h2o(recent=0.3)+x"
    assert framework_of("infinigen(alpha=4, budget={budget})") == "infinigen(alpha=4)"
