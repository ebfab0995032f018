"""Records of published benchmarks as sittings: answered freely, scored by the benchmark's own scorer."""

from collections import Counter
from collections.abc import Sequence

from kvwise.core.errors import PlanError, TaskError
from kvwise.models.text import Tokenizer
from kvwise.study.exam import Answer, Grade, Sample, Sitting, Tokens
from kvwise.study.quality_section import Protocol, Records
from kvwise.tasks.records.base import Record, RecordQuestion, RecordSet
from kvwise.tasks.records.load import load_records


def read_records(given: Sequence[Records]) -> list[RecordSet]:
    """The record files of a plan; PlanError if one is missing or is not what it is said to be."""
    out = []
    for table in given:
        try:
            out.append(load_records(table.kind, table.file, table.limit))
        except TaskError as error:
            raise PlanError(f"quality.records: {error}") from error
    return out


def record_sittings(sets: Sequence[RecordSet], protocols: Sequence[Protocol], tokenizer: Tokenizer) -> list[Sitting]:
    """Every record of every set under every protocol, in the tokens of a model that reads text."""
    out = []
    for protocol in protocols:
        numbers: Counter[str] = Counter()
        for found in sets:
            for record in found.records:
                task = f"{found.name}/{record.task}"
                context = tuple(tokenizer.encode(record.context))
                samples = _samples(found, record, protocol, tokenizer)
                out.append(Sitting(task, protocol, numbers[task], context, samples))
                numbers[task] += 1
    return out


def _samples(found: RecordSet, record: Record, protocol: Protocol, tokenizer: Tokenizer) -> tuple[Sample, ...]:
    """One sample a question.

    In a conversation the right answers stand for the model's own in the turns before, as SCBench has it
    (arXiv 2412.10319): otherwise every strategy would be asked in another conversation.
    """
    before: Tokens = ()
    samples = []
    for index, question in enumerate(record.questions):
        forced = (*before, *tokenizer.encode(question.prompt, add_special=False))
        stop = len(forced) + question.max_new_tokens
        grade = _grade(found, record, question, tokenizer)
        answer = Answer(index, len(forced), stop, exact=False, told=False, grade=grade)
        samples.append(Sample(forced, (answer,), question.max_new_tokens))
        if protocol == "multi-turn":
            before = (*forced, *tokenizer.encode(question.references[0], add_special=False))
    return tuple(samples)


def _grade(found: RecordSet, record: Record, question: RecordQuestion, tokenizer: Tokenizer) -> Grade:
    def grade(said: Sequence[int]) -> float:
        return found.score(record.task, tokenizer.decode(said), question.references)

    return grade
