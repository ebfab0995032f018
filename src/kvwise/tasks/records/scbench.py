"""SCBench (Li et al. 2024, arXiv 2412.10319): JSONL files of its data, one shared context with several turns a line.

A line has `context` (or `input`) and `multi_turns`, a list of objects with `input` and `answer`. The file is called
after its task. The prompts are kvwise's own.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kvwise.core.errors import TaskError
from kvwise.tasks.records.base import Fields, Record, RecordQuestion, RecordSet, known_task, read_lines
from kvwise.tasks.records.scores import bare_chinese, bleu, f1, rouge_lsum

NOT_DIGITS = re.compile(r"[^0-9]+")
NUMBER = re.compile(r"\d+\.\d+|\d+")
WHOLE = re.compile(r"-?\d+")
FENCED = re.compile(r"^```(?:\w+)?\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LETTERS = "ABCD"
CHOICE_SIGNS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
LEAST_SIMILARITY = 0.8  # of a function that counts as found


def contains(prediction: str, references: tuple[str, ...]) -> float:
    """Whether the prediction has the value in it."""
    return float(any(reference in prediction for reference in references))


def mentions(prediction: str, references: tuple[str, ...]) -> float:
    """As `contains`, whatever the case."""
    return float(any(reference.upper() in prediction.upper() for reference in references))


def shared(prediction: str, references: tuple[str, ...]) -> float:
    """Share of the references that the prediction has in it, whatever the case, to two places."""
    return round(sum(reference.lower() in prediction.lower() for reference in references) / len(references), 2)


def first_number(prediction: str, references: tuple[str, ...]) -> float:
    """Whether the first digits of the prediction are the right ones."""
    digits = [run for run in NOT_DIGITS.split(prediction) if run]
    return float(bool(digits) and digits[0] == references[0])


def found_value(prediction: str, references: tuple[str, ...]) -> float:
    """Whether the first number is the right one; against a whole number its fraction is cut off."""
    number, right = NUMBER.search(prediction), references[0]
    if number is None:
        return 0.0
    if WHOLE.fullmatch(right):
        return float(number[0].split(".")[0].lstrip("0") == right.lstrip("0"))
    return float(float(number[0]) == float(right))


def choice(prediction: str, references: tuple[str, ...]) -> float:
    """Whether the prediction names the right option, by its letter or its text, where one would look for it."""
    text = prediction.strip()
    if text[:1] and text[0] in LETTERS:
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(" +", " ", text.translate(CHOICE_SIGNS))
    for prefix in CHOICE_PREFIXES:
        _, said, after = text.partition(prefix)
        if said:
            return float(any(after[1:].startswith(reference) for reference in references))
    letter = next((word for word in text.split() if word in LETTERS), None)
    return float(letter in references)


def characters(prediction: str, references: tuple[str, ...]) -> float:
    """F1 of Chinese characters, the best over the references."""
    return max(f1(bare_chinese(prediction), bare_chinese(reference)) for reference in references)


def summary(prediction: str, references: tuple[str, ...]) -> float:
    """ROUGE-Lsum, the best over the references."""
    return max(rouge_lsum(prediction, reference) for reference in references)


def function(prediction: str, references: tuple[str, ...]) -> float:
    """Whether the function asked for (the first reference) is the most similar of its repository's, and similar enough.

    The authors let a parser find the first function in the answer; here the first code block is taken as a whole.
    """
    block = FENCED.search(prediction.strip())
    code = block[1] if block else prediction.strip()
    right, *others = (bleu(code, reference) for reference in references)
    return float(right >= LEAST_SIMILARITY and all(right >= other for other in others))


Score = Callable[[str, tuple[str, ...]], float]
_JSON = "Below are keys and their values. You will be asked for the value of a key.\n\n"
_BOOK = "Read the book below. Questions about it follow.\n\n"
_CODE = "Below is the code of a project. You will be asked to repeat the function that fits a description.\n\n"
_ASK, _QUESTION = "\n\n{input}", "\n\nQuestion: {input}\nAnswer in as few words as possible.\nAnswer:"


@dataclass(frozen=True, slots=True)
class Turns:
    """How the turns of a task are asked and scored."""

    max_new_tokens: int
    score: Score
    before: str = ""
    question: str = _ASK


TASKS: Mapping[str, Turns] = MappingProxyType(
    {
        "scbench_kv": Turns(150, contains, _JSON),
        "scbench_kv_hard": Turns(150, contains, _JSON),
        "scbench_kv_compressible": Turns(150, contains, _JSON),
        "scbench_prefix_suffix": Turns(150, contains),
        "scbench_hashhop": Turns(150, contains),
        "scbench_vt": Turns(30, shared),
        "scbench_passkey": Turns(15, first_number),
        "scbench_mf": Turns(5, found_value),
        "scbench_many_shot": Turns(10, mentions),
        "scbench_qa_eng": Turns(40, mentions, _BOOK, _QUESTION),
        "scbench_qa_chn": Turns(40, characters, "阅读下面的书。\n\n", "\n\n问题：{input}\n请简短回答："),
        "scbench_choice_eng": Turns(40, choice, _BOOK, "\n\nQuestion: {input}{options}\nThe letter of the answer is"),
        "scbench_summary": Turns(200, summary),
        "scbench_repoqa": Turns(1024, function, _CODE),
    }
)
# Files whose turns are of two tasks, with their own most tokens.
MIXED: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "scbench_summary_with_needles": {"scbench_summary": 800, "scbench_passkey": 15},
        "scbench_repoqa_and_kv": {"scbench_repoqa": 1024, "scbench_kv": 80},
    }
)


def load_scbench(path: str | Path, limit: int | None = None) -> RecordSet:
    """The first `limit` contexts of one SCBench file; TaskError for whatever is wrong with it.

    A context whose turns are of two tasks becomes one record for each of them.
    """
    name = known_task(path, None, (*TASKS, *MIXED), prefixes=("v2_",))
    lines = list(read_lines(path, limit))
    functions = _functions(name, lines)
    records = tuple(record for line in lines for record in _records(name, line, functions))
    return RecordSet(f"scbench/{name.removeprefix('scbench_')}", records, score_scbench)


def score_scbench(task: str, prediction: str, references: tuple[str, ...]) -> float:
    """The authors' score of one turn, 0 to 1."""
    if task not in TASKS:
        raise TaskError(f"SCBench has no task {task!r} (known: {', '.join(TASKS)})")
    return float(TASKS[task].score(prediction, references))


def _records(name: str, line: Fields, functions: Mapping[str, tuple[str, ...]]) -> list[Record]:
    context = line.text("context" if "context" in line.data or "input" not in line.data else "input")
    questions: dict[str, list[RecordQuestion]] = {}
    for turn in line.objects("multi_turns"):
        task = _task_of(name, turn)
        tokens = MIXED[name][task] if name in MIXED else TASKS[task].max_new_tokens
        references = _references(task, turn)
        if task == "scbench_repoqa":
            references += tuple(code for code in functions[_repository(line)] if code not in references)
        questions.setdefault(task, []).append(RecordQuestion(_prompt(task, turn), references, tokens))
    return [Record(task, TASKS[task].before + context, tuple(asked)) for task, asked in questions.items()]


def _task_of(name: str, turn: Fields) -> str:
    if name not in MIXED:
        return name
    task = turn.text("task")
    if task not in MIXED[name]:
        raise turn.error(f"field 'task' is {task!r}: it must be one of {', '.join(MIXED[name])}")
    return task


def _prompt(task: str, turn: Fields) -> str:
    text = TASKS[task].question.replace("{input}", turn.text("input"))
    if task == "scbench_choice_eng":
        options = zip(LETTERS, turn.texts("options"), strict=False)
        text = text.replace("{options}", "".join(f"\n{letter}. {option}" for letter, option in options))
    return text


def _references(task: str, turn: Fields) -> tuple[str, ...]:
    references = turn.texts("answer")
    if task == "scbench_choice_eng":
        options = turn.texts("options")
        if len(options) != len(LETTERS) or references[0] not in options:
            raise turn.error(f"field 'options' must hold {len(LETTERS)} texts, the answer {references[0]!r} among them")
        return references[0], LETTERS[options.index(references[0])]
    if task == "scbench_mf" and not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", references[0]):
        raise turn.error(f"field 'answer' is {references[0]!r}: it must be a number")
    return references


def _repository(line: Fields) -> str:
    return line.text("repo") if "repo" in line.data else line.where


def _functions(name: str, lines: list[Fields]) -> dict[str, tuple[str, ...]]:
    """All functions asked for, by repository: the answer must be more like the right one than like any other."""
    found: dict[str, tuple[str, ...]] = {}
    if "repoqa" not in name:
        return found
    for line in lines:
        turns = [turn for turn in line.objects("multi_turns") if _task_of(name, turn) == "scbench_repoqa"]
        codes = [turn.texts("answer")[0] for turn in turns]
        found[_repository(line)] = (*found.get(_repository(line), ()), *codes)
    return found
