"""Cells: every combination once, named by all it depends on, in an order that spreads noise."""

import math

import pytest

from kvwise.core.errors import PlanError
from kvwise.study.cells import Cell, CellKind, expand, framework_of
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


def quality(text: str, **changes: object) -> list[Cell]:
    plan = make_plan(text)
    asked = plan.quality.model_copy(update=changes)
    return expand(plan.model_copy(update={"quality": asked}), quality_only=True)


def test_quality_is_measured_once_for_all_blocks_by_model_and_context() -> None:
    cells = quality(PLAN)
    assert {c.kind for c in cells} == {CellKind.QUALITY}
    assert {(c.model, c.context) for c in cells} == {("random:3m", 512), ("random:13m", 512)}
    # full, full+prefix, two budgets each of h2o and infinigen; h2o at another budget, and hungry.
    assert len(cells) == 6 + 8
    places = [(c.model, c.context) for c in cells]
    assert places == sorted(places, key=places.index)  # what the full cache said is needed for one place at a time
    own = quality(PLAN, context_lengths=())
    assert {(c.model, c.context) for c in own} == {("random:3m", 128), ("random:13m", 128), ("random:13m", 256)}


def test_the_full_cache_is_always_measured_first() -> None:
    for text in (PLAN, PLAN.replace('"full", "h2o', '"h2o')):
        cells = quality(text)
        for model in ("random:3m", "random:13m"):
            assert [c.strategy for c in cells if c.model == model].index("full") == 0


def test_guides_are_measured_at_their_budgets_on_models_that_have_tasks() -> None:
    text = PLAN.replace('"random:3m", "random:13m"', '"random:3m", "builtin:recall"')
    cells = quality(text, guides=("window(budget={budget})", "topk(budget=0.3)"), guide_budgets=(0.4, 0.6))
    guides = {(c.model, c.strategy, c.budget) for c in cells if c.framework in ("window", "topk")}
    assert guides == {
        ("builtin:recall", "window(budget=0.4)", 0.4),
        ("builtin:recall", "window(budget=0.6)", 0.6),
        ("builtin:recall", "topk(budget=0.3)", 0.3),
    }


def test_quality_only_leaves_out_all_else_and_keeps_the_names() -> None:
    plan = make_plan()
    only = expand(plan, quality_only=True)
    assert only == expand(plan.model_copy(update={"quality_only": True}))
    assert only == [c for c in expand(plan) if c.kind is CellKind.QUALITY]
    silent = PLAN.replace('name = "main"', 'name = "main"\nquality = false')
    assert {c.model for c in quality(silent)} == {"random:13m"}
    with pytest.raises(PlanError, match="measures no quality"):
        quality(silent.replace('name = "memory"', 'name = "memory"\nquality = false'))


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
