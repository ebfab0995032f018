"""docs/tasks.md, made of the tasks themselves, with an example of each.

`python -m kvwise.tasks.page > docs/tasks.md` makes it anew.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.core.options import show_value
from kvwise.tasks.base import Episode, Task
from kvwise.tasks.catalogue import tasks
from kvwise.tasks.language import Language
from kvwise.tasks.records.longbench import DATASETS
from kvwise.tasks.records.ruler import TASKS as RULER
from kvwise.tasks.records.scbench import MIXED
from kvwise.tasks.records.scbench import TASKS as SCBENCH
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import FIRST_FILLER, FIRST_KEY, FIRST_WORD, GROUP_SIZE, TokenLanguage

MARKERS = ("BOS", "KEY", "QUERY", "LINK", "TRACE", "COUNT", "PASSAGE", "CONTINUE")
WIDTH = 115
VOCABULARY = 512
_PAGE = """# Tasks

A task makes *episodes* from seeds: a context of exactly the asked number of tokens, and questions about it with the
only right answer and the places in the context that hold it (the *evidence*). No two questions of an episode ask for
the same fact, so that no answer gives away another. A context is compressed before it is asked about.

A task is written in a *language*. `TokenLanguage` is that of the built-in model: markers, keys, values and a filler
whose transition table is part of the language. `TextLanguage` writes the same tasks as English text for a model with a
tokenizer. Its statements are encoded piece by piece, so that a value has the same tokens in the statement and in the
answer, and statements stand between whole sentences.

A task is named in a plan or in Python as `needle` or `needle(depth=0.5)`.

| task | asks for | after | options |
|---|---|---|---|
{rows}

{sections}

## Adding a task

One file in `tasks/synthetic/` with one frozen dataclass; its fields are the options. The catalogue finds it, and the
tests ask it for what every task promises. A package of your own names its class in the entry points
`kvwise.tasks`.

```python
{example}
```

## Files of published benchmarks

`load_records(kind, path, limit=None)` (`kvwise.tasks.records.load`) reads records from a JSONL file that you have
and scores answers as the authors' scripts do, 0 to 1. kvwise ships none of the data. What cannot be read is refused
with file, line, field and way out.

| kind | file | tasks |
|---|---|---|
{kinds}

How they differ from the authors' own runs:

* **RULER**: the question is cut off the end of `input` and asked after the context has been compressed. A file is
  known by its name or its folder's (`niah_single_1/validation.jsonl`), or by a field `task`.
* **LongBench**: prompts are worded anew, unless the authors' `dataset2prompt.json` lies beside the file: then it is
  used. Contexts are not shortened in the middle. Datasets in Chinese that are scored by words need
  `pip install 'kvwise[records]'`.
* **SCBench**: prompts are worded anew. Where the turns of a file are of two tasks, each task is a record of its own.
  In `scbench_repoqa` the first code block of an answer is compared, not the first function a parser finds in it. An
  answer that is one text is one reference (`scbench_many_shot`).

This page is made by `python -m kvwise.tasks.page`; a test compares the two.
"""
EXAMPLE = '''"""Backwards: the passage from its last symbol to its first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.tasks.base import Episode, Question, Task, lay_out
from kvwise.tasks.language import Language


@dataclass(frozen=True)
class Backwards(Task):
    """One passage of `num_symbols` symbols, asked for in reverse."""

    num_symbols: int = 5

    name: ClassVar[str] = "backwards"
    idea: ClassVar[str] = "a passage in reverse"
    source: ClassVar[str] = "the documentation of kvwise"

    def __post_init__(self) -> None:
        self.require("num_symbols", self.num_symbols >= 2, "at least 2")

    def episode(self, rng: np.random.Generator, language: Language, length: int) -> Episode:
        """One question."""
        symbols = language.values(rng, self.num_symbols)
        laid = lay_out(rng, language, [language.passage(symbols)], length)
        answer = language.answer(symbols[::-1])
        return Episode(laid.tokens, (Question(language.ask_passage(symbols[:1]), answer),))'''


def document() -> str:
    """The text of docs/tasks.md."""
    known = tasks().values()
    return _PAGE.format(
        rows="\n".join(f"| `{kind.name}` | {kind.idea} | {kind.source} | {_options(kind)} |" for kind in known),
        sections="\n\n".join(_section(kind()) for kind in known),
        example=EXAMPLE,
        kinds="\n".join(_kinds()),
    )


def _options(kind: type[Task]) -> str:
    return ", ".join(f"`{field.name}={show_value(field.default)}`" for field in fields(kind)) or "none"


def _section(task: Task) -> str:
    token, text = TokenLanguage(VOCABULARY), TextLanguage(lambda said: list(said.encode()), _read)
    return "\n".join(
        [
            f"## {task.name}",
            "",
            textwrap.fill(" ".join((inspect.getdoc(type(task)) or "").split()), WIDTH),
            "",
            "```",
            *_example(task, token, lambda tokens: " ".join(map(_named, tokens)), 8),
            "",
            *_example(task, text, _read, 60),
            "```",
        ]
    )


def _example(task: Task, language: Language, show: Callable[[Sequence[int]], str], filler: int) -> list[str]:
    """The shortest episode that `task` can be made for, with a little more filler, as lines."""
    episode = _shortest(task, language, filler)
    question = episode.questions[0]
    asked = " ".join(show(question.prompt).split()) or "(nothing)"
    shown = {"context": show(episode.context).strip(), "ask": asked, "answer": show(question.answer).strip()}
    lines = [f"{what:<9}{text}" for what, text in shown.items()]
    return [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9)]


def _shortest(task: Task, language: Language, filler: int) -> Episode:
    length = 1
    while True:
        try:
            task.episode(np.random.default_rng(0), language, length)
            return task.episode(np.random.default_rng(0), language, length + filler)
        except TaskError:
            length += 1


def _named(token: int) -> str:
    """A token as the pages write it: markers by name, f filler, w words, k keys, v values."""
    if token < FIRST_FILLER:
        return MARKERS[token]
    if token < FIRST_WORD:
        return f"f{token - FIRST_FILLER}"
    if token < FIRST_KEY:
        return f"w{(token - FIRST_WORD) // GROUP_SIZE}.{(token - FIRST_WORD) % GROUP_SIZE}"
    key = token - FIRST_KEY
    half = (VOCABULARY - FIRST_KEY) // 2
    return f"k{key}" if key < half else f"v{key - half}"


def _read(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def _kinds() -> list[str]:
    files: Mapping[str, tuple[str, Iterable[str]]] = {
        "ruler": ("what the scripts of NVIDIA/RULER write", RULER),
        "longbench": ("of the data archive of THUDM/LongBench, LongBench-E too", DATASETS),
        "scbench": ("of the data of microsoft/SCBench", (*SCBENCH, *MIXED)),
    }
    return [f"| `{kind}` | {file} | {_listed(names)} |" for kind, (file, names) in files.items()]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.removeprefix('scbench_')}`" for name in names)


if __name__ == "__main__":
    print(document(), end="")
