"""Strategies that differ in one number are one line; labels say what tells lines apart; a chart never has too many."""

import pytest

from kvwise.study.chart import COLOURS, colours
from kvwise.study.groups import MOST, groups
from kvwise.study.names import Line, labels, lines, shared_note
from kvwise.study.plan import read_plan_text
from kvwise.study.who import Who


def test_one_line_for_what_differs_in_one_number() -> None:
    names = ["kivi(bits=1, residual=32)", "kivi(bits=2, residual=32)", "kivi(bits=4, residual=32)",
             "kivi(bits=2, residual=128)", "int4", "int4(value_bits=2)", "h2o", "h2o(heads=adakv)"]  # fmt: skip
    found = lines(names)
    assert [found[n] for n in names[:3]] == [Line("kivi(residual=32)", f"bits {b}") for b in (1, 2, 4)]
    # The others are on the longer line; and an option that only one has is no axis.
    assert [found[n] for n in names[3:]] == [Line(n) for n in names[3:]]


def test_compositions_vary_in_a_part() -> None:
    names = ["h2o+kivi(bits=2)", "h2o+kivi(bits=4)", "snapkv+kivi(bits=2)"]
    found = lines(names)
    assert found["h2o+kivi(bits=4)"] == Line("h2o+kivi", "bits 4")
    assert found["snapkv+kivi(bits=2)"] == Line("snapkv+kivi(bits=2)")


def test_labels_leave_out_what_all_share() -> None:
    names = ["h2o+kivi(bits=2, residual=32)", "streaming+kivi(bits=2, residual=32)+prefix", "h2o(heads=adakv)"]
    assert labels(names) == dict(zip(names, ["h2o+kivi", "streaming+kivi+prefix", "h2o adakv"], strict=True))
    assert shared_note(names) == "kivi with bits=2, residual=32"
    assert labels(["h2o(normalised=true)", "corm(window=16)"]) == {
        "h2o(normalised=true)": "h2o normalised", "corm(window=16)": "corm window 16"
    }  # fmt: skip
    assert labels(["what is (this"]) == {"what is (this": "what is (this"}


PLAN = """
[[block]]
name = "dropping"
strategies = ["h2o(budget={budget})", "snapkv(budget={budget})"]
budgets = [0.5, 0.2]
models = ["builtin:recall"]
[block.workload]
kind = "random"
[[block]]
name = "storing"
strategies = ["h2o(budget={budget})", "int4"]
budgets = [0.5]
models = ["builtin:recall"]
[block.workload]
kind = "random"
"""


def whos(extra: int) -> list[Who]:
    texts = ["full", "h2o(budget=0.5)", "h2o(budget=0.2)", "snapkv(budget=0.5)", "snapkv(budget=0.2)", "int4"]
    known = [Who(t.partition("(")[0], None, t) for t in texts]
    return known + [Who(f"guide{i}", None, f"guide{i}") for i in range(extra)]


def test_many_strategies_are_drawn_block_by_block() -> None:
    plan = read_plan_text(PLAN, "test")
    few = whos(MOST - 4)
    assert groups(plan, few) == {"": few}
    found = {name: [w.strategy for w in members] for name, members in groups(plan, whos(MOST)).items()}
    assert list(found) == ["dropping", "storing", "others"]
    assert found["dropping"] == ["full", "h2o(budget=0.5)", "h2o(budget=0.2)", "snapkv(budget=0.5)",
                                 "snapkv(budget=0.2)"]  # fmt: skip
    assert found["storing"] == ["full", "h2o(budget=0.5)", "int4"]
    assert found["others"] == ["full", *(f"guide{i}" for i in range(MOST))]


@pytest.mark.parametrize("count", [3, 9])
def test_lines_of_one_chart_have_colours_of_their_own(count: int) -> None:
    one, two = ([f"{name}{i}" for i in range(count)] for name in "ab")
    paint = colours(["h2o", *one, *two], [{"h2o", *one}, {"h2o", *two}])
    assert paint["h2o"] == COLOURS["h2o"]
    for names in (one, two):
        assert len({paint[name] for name in ["h2o", *names]}) == count + 1
