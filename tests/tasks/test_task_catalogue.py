"""Tasks by name: found, made from text, and printed so that they parse back."""

from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvwise.tasks.catalogue as catalogue
from kvwise.core.errors import TaskError
from kvwise.tasks.base import Task
from kvwise.tasks.catalogue import parse_task, tasks
from kvwise.tasks.synthetic.needle import Needle
from kvwise.tasks.token_language import TokenLanguage

NAMES = [
    *("continuation", "copy", "counting", "early_fact", "forgetting"),
    *("multi_value", "needle", "recall", "tracking"),
]


def test_every_task_is_found_and_says_what_it_is() -> None:
    assert list(tasks()) == NAMES
    for name, kind in tasks().items():
        assert kind.name == name
        assert kind.idea
        assert kind.source
        assert kind.__doc__
    assert [name for name, kind in tasks().items() if not kind.exact] == ["continuation"]
    tasks().clear()
    assert list(tasks()) == NAMES, "a caller's copy is the caller's"


@pytest.mark.parametrize("name", NAMES)
def test_the_name_alone_is_the_default(name: str) -> None:
    assert parse_task(name) == tasks()[name]()
    assert str(parse_task(name)) == name


@pytest.mark.parametrize(
    "text",
    ["needle(depth=0.5)", "counting(num_words=5, share=0.3)", "tracking(fewest=3)", "needle(depth=0, num_values=2)"],
)
def test_options_print_and_parse_back(text: str) -> None:
    assert str(parse_task(text)) == text
    assert parse_task(str(parse_task(text))) == parse_task(text)


def test_none_is_a_value() -> None:
    assert parse_task("needle(depth=None)") == parse_task("needle(depth=none)") == Needle()
    assert parse_task(" needle( depth = 1 ) ") == Needle(depth=1.0)


@given(st.floats(0, 1))
def test_any_depth_survives_printing(depth: float) -> None:
    assert parse_task(str(Needle(depth=depth))) == Needle(depth=depth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nedle", r"unknown task 'nedle'; did you mean 'needle'\? \(known: continuation, .*tracking\)"),
        ("zzz", r"unknown task 'zzz' \(known"),
        ("", "'' is no task; write name"),
        ("needle(depth=0.5", "is no task"),
        ("needle(0.5)", "needle: '0.5' is no option; write option=value"),
        ("needle(depth=0.5, depth=0.5)", "option 'depth' is given twice"),
        ("needle(deep=1)", "needle has no option 'deep'; its options: depth, num_values"),
        ("recall(a=1)", "recall has no option 'a'; its options: none"),
        ("needle(depth=deep)", "needle: depth='deep' must be a number"),
        ("needle(depth=true)", "needle: depth=True must be a number"),
        ("needle(num_values=1.5)", "num_values=1.5 must be a whole number"),
        ("needle(num_values=None)", "num_values=None must be a whole number"),
        ("needle(depth=1.5)", "needle: depth=1.5 is out of range: it must be 0"),
        ("needle(depth=nan)", "depth=nan is out of range"),
        ("needle(num_values=0)", "num_values=0 is out of range: it must be at least 1"),
        ("multi_value(num_values=0)", "at least 1"),
        ("copy(num_symbols=2)", "num_symbols=2 is out of range: it must be more than 2"),
        ("counting(num_words=1)", "at least 2"),
        ("counting(share=0)", "share=0 is out of range"),
        ("counting(share=1.1)", "share=1.1 is out of range"),
        ("tracking(fewest=0)", "at least 1"),
        ("tracking(fewest=3, most=2)", "most=2 is out of range: it must be from fewest=3"),
        ("forgetting(most=0)", "most=0 is out of range: it must be 1 to"),
        ("early_fact(num_facts=0)", "at least 1"),
        ("continuation(num_tokens=0)", "num_tokens=0 is out of range: it must be 1 to"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        parse_task(text)


@given(st.sampled_from(NAMES), st.sampled_from(["depth", "num_values", "most", "fewest", "num_words", "num_tokens"]))
def test_absurd_numbers_are_refused_here_or_by_the_episode(name: str, option: str) -> None:
    for value in ("1e400", "-1", "9" * 30, "9" * 5000):
        with pytest.raises(TaskError):
            parse_task(f"{name}({option}={value})").episode(np.random.default_rng(0), TokenLanguage(128), 64)


class Mine(Needle):
    name = "mine"


def test_other_packages_add_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer(*targets: str) -> None:
        points = [EntryPoint(f"p{i}", target, "kvwise.tasks") for i, target in enumerate(targets)]
        monkeypatch.setattr(catalogue, "entry_points", lambda group: points if group == "kvwise.tasks" else [])
        catalogue._known.cache_clear()

    try:
        offer(f"{__name__}:Mine")
        assert str(parse_task("mine(depth=0.25)")) == "mine(depth=0.25)"
        offer(f"{__name__}:Mine", f"{__name__}:Other")
        with pytest.raises(TaskError, match="two tasks are called 'mine'"):
            tasks()
        offer("collections:Counter")
        with pytest.raises(TaskError, match="no subclass of Task"):
            tasks()
    finally:
        monkeypatch.undo()
        catalogue._known.cache_clear()


class Other(Mine):
    name = "mine"


def test_a_task_is_a_value() -> None:
    assert len({Needle(), Needle(), Needle(depth=0.5)}) == 2
    assert isinstance(Needle(), Task)
