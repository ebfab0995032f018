"""docs/tasks.md is what the code says, and its example works."""

import re
from pathlib import Path

import numpy as np
import pytest

from kvwise.core.errors import TaskError
from kvwise.tasks.base import Task
from kvwise.tasks.catalogue import tasks
from kvwise.tasks.page import EXAMPLE, document
from kvwise.tasks.token_language import TokenLanguage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), "make it anew: python -m kvwise.tasks.page > docs/tasks.md"


def test_every_task_has_its_section_and_examples() -> None:
    page = PAGE.read_text()
    for name in tasks():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert len(re.findall(r"^context ", section, re.MULTILINE)) == 2
        assert len(re.findall(r"^answer +\S", section, re.MULTILINE)) == 2


def test_the_example_of_a_new_task_works() -> None:
    written: dict[str, object] = {"__name__": "backwards"}
    exec(EXAMPLE, written)
    kind = written["Backwards"]
    assert isinstance(kind, type)
    assert issubclass(kind, Task)
    task = kind.build({"num_symbols": 3})
    assert str(task) == "backwards(num_symbols=3)"
    episode = task.episode(np.random.default_rng(0), TokenLanguage(512), 40)
    start = episode.context.index(6)
    assert episode.questions[0].answer == episode.context[start + 1 : start + 4][::-1]
    with pytest.raises(TaskError, match="at least 2"):
        kind.build({"num_symbols": 1})
