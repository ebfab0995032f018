"""RULER (Hsieh et al. 2024, arXiv 2404.06654): files that the scripts of NVIDIA/RULER have written.

A line has `input` (context and question in one text), `answer_prefix` (how the answer begins) and `outputs` (what it
must contain). The file is called after its task, or stands in a folder that is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kvwise.core.errors import TaskError
from kvwise.tasks.records.base import Fields, Record, RecordQuestion, RecordSet, known_task, read_lines

CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks that are asked and scored alike."""

    question: re.Pattern[str]  # where the question begins in `input`: the last place that matches
    max_new_tokens: int
    one_is_enough: bool = False  # score by the best reference instead of the share of references


_ASKED = re.compile(r"\bQuestion: ")
NEEDLE = Family(re.compile(r"\bWhat (?:is|are all) the special magic "), 128)
TRACKING, COMMON, FREQUENT, QA = Family(_ASKED, 30), Family(_ASKED, 120), Family(_ASKED, 50), Family(_ASKED, 32, True)

TASKS: Mapping[str, Family] = MappingProxyType(
    {
        **{f"niah_single_{i}": NEEDLE for i in (1, 2, 3)},
        **{f"niah_multikey_{i}": NEEDLE for i in (1, 2, 3)},
        "niah_multivalue": NEEDLE,
        "niah_multiquery": NEEDLE,
        "vt": TRACKING,
        "cwe": COMMON,
        "fwe": FREQUENT,
        "qa_1": QA,
        "qa_2": QA,
    }
)


def load_ruler(path: str | Path, limit: int | None = None) -> RecordSet:
    """The records of one RULER file; TaskError for whatever is wrong with it.

    The question is cut off the end of `input`, so that a context can be compressed before it is asked.
    """
    records = tuple(_record(path, line) for line in read_lines(path, limit))
    return RecordSet(f"ruler/{records[0].task}", records, score_ruler)


def score_ruler(task: str, prediction: str, references: tuple[str, ...]) -> float:
    """Share of the references that the prediction contains, whatever their case; for QA: 1 if it contains any."""
    family = TASKS.get(task)
    if family is None:
        raise TaskError(f"RULER has no task {task!r} (known: {', '.join(TASKS)})")
    text = CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [reference.lower() in text for reference in references]
    return float(any(found)) if family.one_is_enough else sum(found) / len(found)


def _record(path: str | Path, line: Fields) -> Record:
    task = known_task(path, line.text("task") if "task" in line.data else None, tuple(TASKS))
    family = TASKS[task]
    text = line.text("input")
    places = [match.start() for match in family.question.finditer(text)]
    context = text[: places[-1]].rstrip() if places else ""
    if not context:
        raise line.error(f"field 'input' has no question of task {task!r} behind a context, as RULER writes it")
    prefix = line.text("answer_prefix") if "answer_prefix" in line.data else ""
    references = line.texts("output" if "output" in line.data and "outputs" not in line.data else "outputs")
    question = RecordQuestion(text[len(context) :] + prefix, references, family.max_new_tokens)
    return Record(task, context, (question,))
