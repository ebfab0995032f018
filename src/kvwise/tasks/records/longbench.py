"""LongBench (Bai et al. 2023, arXiv 2308.14508): the JSONL files of its data archive, LongBench-E included.

A line has `context`, `input` (what is asked), `answers`, `dataset` and, for classification, `all_classes`. The
prompts are kvwise's own; those of the authors are used if their `dataset2prompt.json` lies beside the file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kvwise.core.errors import TaskError
from kvwise.tasks.records.base import Fields, Record, RecordQuestion, RecordSet, known_task, read_lines
from kvwise.tasks.records.scores import bare_chinese, chinese_words, edit_similarity, english_words, f1, rouge_l

PROMPT_FILE = "dataset2prompt.json"  # of THUDM/LongBench: dataset -> template with {context} and {input}
NUMBER = re.compile(r"\d+")
PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
NO_CODE = ("`", "#", "//")


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of English words."""
    return f1(english_words(prediction), english_words(reference))


def qa_f1_chinese(prediction: str, reference: str) -> float:
    """F1 of Chinese words, without those that are punctuation only."""
    said, right = ([bare for word in chinese_words(t) if (bare := bare_chinese(word))] for t in (prediction, reference))
    return f1(said, right)


def rouge_chinese(prediction: str, reference: str) -> float:
    """ROUGE-L of Chinese words."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def count_score(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the right one."""
    numbers = NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, reference: str) -> float:
    """As `count_score`, with the number of the paragraph that the reference names."""
    right = PARAGRAPH.search(reference)
    return count_score(prediction, right[1]) if right else 0.0


def code_score(prediction: str, reference: str) -> float:
    """Edit similarity of the first line that is no comment and no fence."""
    lines = prediction.lstrip("\n").split("\n")
    return edit_similarity(next((line for line in lines if not any(s in line for s in NO_CODE)), ""), reference)


def class_score(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """One, shared among all classes that the prediction names, if the right one is among them.

    Classes whose name is part of the right one's do not count; but as the authors' code takes them off the list while
    it walks along it, the class behind one that was taken off is never looked at.
    """
    named: list[str] = []
    passed_over = False
    for name in (name for name in classes if name in prediction):
        passed_over = not passed_over and name in reference and name != reference
        if not passed_over:
            named.append(name)
    return 1 / len(named) if reference in named else 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands around the context and the input; the context ends where the question begins."""

    before: str
    question: str


_TEXT = "Read the text below. A question about it follows.\n\n"
PLAIN = Prompt("", "{input}")
EXAMPLES = Prompt("", "\n{input}")
QA = Prompt(_TEXT, "\n\nQuestion: {input}\nAnswer in as few words as possible.\nAnswer:")
QUERY = Prompt(_TEXT, "\n\nAnswer this in a few sentences: {input}\nAnswer:")
SUMMARY = Prompt("", "\n\nSummarise all of the above on one page.\nSummary:")
COUNT = Prompt(_TEXT, "\n\nHow many paragraphs are there, if repeated ones count once? Say a number only.\nAnswer:")
RETRIEVAL = Prompt(_TEXT, '\n\nWhich paragraph sums up to this?\n\n{input}\n\nAnswer such as "Paragraph 1".\nAnswer:')
QA_CHINESE = Prompt("阅读下文。\n\n", "\n\n问题：{input}\n请简短回答：")
SUMMARY_CHINESE = Prompt("", "\n\n请总结以上内容。\n总结：")
RETRIEVAL_CHINESE = Prompt("阅读下文。\n\n", "\n\n以下内容概括了哪一段？\n\n{input}\n\n请按“段落1”的格式回答：")


@dataclass(frozen=True, slots=True)
class Dataset:
    """How a dataset is asked and scored; `first_line`: only the first line of a prediction counts."""

    max_new_tokens: int
    prompt: Prompt
    metric: Callable[[str, str], float] | None  # None: classification, which needs the classes
    first_line: bool = False


DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "narrativeqa": Dataset(128, QA, qa_f1),
        "qasper": Dataset(128, QA, qa_f1),
        "multifieldqa_en": Dataset(64, QA, qa_f1),
        "multifieldqa_zh": Dataset(64, QA_CHINESE, qa_f1_chinese),
        "hotpotqa": Dataset(32, QA, qa_f1),
        "2wikimqa": Dataset(32, QA, qa_f1),
        "musique": Dataset(32, QA, qa_f1),
        "dureader": Dataset(128, QA_CHINESE, rouge_chinese),
        "gov_report": Dataset(512, SUMMARY, rouge_l),
        "qmsum": Dataset(512, QUERY, rouge_l),
        "multi_news": Dataset(512, SUMMARY, rouge_l),
        "vcsum": Dataset(512, SUMMARY_CHINESE, rouge_chinese),
        "trec": Dataset(64, EXAMPLES, None, first_line=True),
        "triviaqa": Dataset(32, EXAMPLES, qa_f1, first_line=True),
        "samsum": Dataset(128, EXAMPLES, rouge_l, first_line=True),
        "lsht": Dataset(64, EXAMPLES, None, first_line=True),
        "passage_count": Dataset(32, COUNT, count_score),
        "passage_retrieval_en": Dataset(32, RETRIEVAL, retrieval_score),
        "passage_retrieval_zh": Dataset(32, RETRIEVAL_CHINESE, retrieval_score),
        "lcc": Dataset(64, PLAIN, code_score),
        "repobench-p": Dataset(64, PLAIN, code_score),
    }
)
CHINESE_METRICS = (qa_f1_chinese, rouge_chinese)


@dataclass(frozen=True, slots=True)
class LongBenchScore:
    """The authors' scores, 0 to 1: the best over all references."""

    classes: tuple[str, ...]

    def __call__(self, task: str, prediction: str, references: tuple[str, ...]) -> float:
        """TaskError for an unknown dataset, and for one in Chinese where the package to score it is missing."""
        dataset = DATASETS.get(task)
        if dataset is None:
            raise TaskError(f"LongBench has no dataset {task!r} (known: {', '.join(DATASETS)})")
        if dataset.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if dataset.metric is None:
            return max(class_score(prediction, reference, self.classes) for reference in references)
        return max(dataset.metric(prediction, reference) for reference in references)


def load_longbench(path: str | Path, limit: int | None = None) -> RecordSet:
    """The records of one LongBench file; TaskError for whatever is wrong with it.

    Contexts are not shortened: the authors cut out the middle of those that are too long for a model.
    """
    prompts = _own_prompts(Path(path).parent / PROMPT_FILE)
    records, classes = [], tuple[str, ...]()
    for line in read_lines(path, limit):
        task = known_task(path, line.text("dataset").removesuffix("_e"), tuple(DATASETS))
        records.append(_record(task, prompts.get(task, DATASETS[task].prompt), line))
        if DATASETS[task].metric is None:
            classes = line.texts("all_classes")
    if any(DATASETS[record.task].metric in CHINESE_METRICS for record in records):
        chinese_words("")  # better now than after hours of answers
    return RecordSet(f"longbench/{records[0].task}", tuple(records), LongBenchScore(classes))


def _record(task: str, prompt: Prompt, line: Fields) -> Record:
    question = prompt.question.replace("{input}", line.text("input"))
    context = prompt.before + line.text("context")
    references = line.texts("answers")
    return Record(task, context, (RecordQuestion(question, references, DATASETS[task].max_new_tokens),))


def _own_prompts(file: Path) -> dict[str, Prompt]:
    """The user's prompts by dataset: none if there is no such file."""
    try:
        if not file.is_file():
            return {}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"cannot read the prompts in {str(file)!r}: {error}; mend or remove that file") from error
    fields = Fields(str(file), data if isinstance(data, dict) else {})
    return {name: _split(fields, name) for name in fields.data if name in DATASETS}


def _split(fields: Fields, name: str) -> Prompt:
    before, found, after = fields.text(name).partition("{context}")
    if not found or "{input}" in before:
        raise fields.error(f"{name!r} must have {{context}}, and {{input}} only after it: the context is read first")
    return Prompt(before, after)
