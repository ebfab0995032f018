"""The exam: the same for all, long enough for the error it claims, and every answer where it is said to be."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kvwise.core.errors import PlanError, TaskError
from kvwise.models.text import ByteTokenizer
from kvwise.study.exam import MIN_EPISODES, Sitting, agreement_sittings, force, task_sittings
from kvwise.study.exam_records import read_records, record_sittings
from kvwise.study.quality_section import TASKS, Protocol, Records
from kvwise.tasks.catalogue import parse_task
from kvwise.tasks.records.base import Record, RecordQuestion, RecordSet
from tests.study.fake import LANGUAGE, VOCAB


def sit(tasks: tuple[str, ...], *protocols: Protocol, context: int = 128, answers: int = 40) -> list[Sitting]:
    return task_sittings(tasks, protocols or ("multi-turn",), LANGUAGE, context, num_answers=answers, seed=0)


def test_every_exact_task_has_as_many_answers_as_its_error_needs() -> None:
    counts: Counter[str] = Counter()
    episodes: Counter[str] = Counter()
    for sitting in sit(TASKS):
        episodes[sitting.task] += 1
        assert len(sitting.context) == 128
        for sample in sitting.samples:
            for answer in sample.answers:
                assert answer.exact == parse_task(sitting.task).exact
                counts[sitting.task] += 1 if answer.exact else answer.stop - answer.start
    assert set(counts) == set(TASKS)
    assert min(counts.values()) >= 40
    assert min(episodes.values()) >= MIN_EPISODES


def test_the_exam_is_the_same_for_all_and_a_task_less_leaves_the_others_as_they_are() -> None:
    assert sit(TASKS) == sit(TASKS)
    assert [s for s in sit(TASKS) if s.task == "copy"] == sit(("copy",))
    assert task_sittings(("copy",), ["multi-turn"], LANGUAGE, 128, num_answers=40, seed=1) != sit(("copy",))


def test_a_conversation_forces_all_questions_and_forks_force_one_each() -> None:
    turns, requests = (sit(("recall",), protocol) for protocol in ("multi-turn", "multi-request"))
    for turn, request in zip(turns, requests, strict=True):
        assert turn.context == request.context
        (whole,) = turn.samples
        assert whole.forced == tuple(token for sample in request.samples for token in sample.forced)
        for answer, sample in zip(whole.answers, request.samples, strict=True):
            (alone,) = sample.answers
            said = whole.forced[answer.start : answer.stop]
            assert said == sample.forced[alone.start : alone.stop] == sample.forced[-1:]
            assert answer.depth == alone.depth
            # The answer is what stands at its depth.
            assert answer.depth is not None
            assert turn.context[round(answer.depth * 128)] == said[0]


def test_a_context_that_is_too_short_names_the_task() -> None:
    with pytest.raises(TaskError, match="task 'counting': a context of 16 tokens is too short"):
        sit(("counting",), context=16)


def test_random_prompts_share_their_first_half_and_are_forced_as_the_full_cache_went_on() -> None:
    found = agreement_sittings(20, 3, 5, seed=0, vocab_size=1000)
    assert len({s.context[:10] for s in found}) == 1
    assert len({s.context[10:] for s in found}) == 3
    assert all(s.samples[0].num_free == 5 and not s.samples[0].forced for s in found)
    (sample,) = force(found[0], [[1, 2, 3, 4, 5]]).samples
    assert (sample.forced, sample.num_free) == ((1, 2, 3, 4, 5), 0)


def record(*questions: tuple[str, str]) -> RecordSet:
    asked = tuple(RecordQuestion(prompt, (answer,), 4) for prompt, answer in questions)
    return RecordSet("set", (Record("task", "the text", asked),), lambda task, said, right: float(said in right))


def test_records_are_generated_behind_the_question_with_right_answers_in_the_turns_before() -> None:
    tokenizer = ByteTokenizer(VOCAB)
    sets = [record(("q1", "a1"), ("q2", "a2"))]
    (turns,) = record_sittings(sets, ["multi-turn"], tokenizer)
    assert (turns.task, tokenizer.decode(turns.context)) == ("set/task", "the text")
    assert [tokenizer.decode(s.forced) for s in turns.samples] == ["q1", "q1a1q2"]
    (requests,) = record_sittings(sets, ["multi-request"], tokenizer)
    assert [tokenizer.decode(s.forced) for s in requests.samples] == ["q1", "q2"]
    for sample in requests.samples:
        (answer,) = sample.answers
        assert (answer.start, answer.stop, sample.num_tokens) == (2, 6, 6)
        assert answer.grade is not None
    grade = requests.samples[1].answers[0].grade
    assert grade is not None
    assert (grade(tokenizer.encode("a2", add_special=False)), grade([65])) == (1.0, 0.0)


def test_record_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "niah_single_1.jsonl"
    line = {
        "index": 0,
        "input": "Some text. What is the special magic number for it mentioned in the provided text?",
        "answer_prefix": " It is",
        "outputs": ["7"],
        "length": 5,
    }
    file.write_text(json.dumps(line) + "\n")
    (found,) = read_records([Records(kind="ruler", file=str(file))])
    assert len(found.records) == 1
    with pytest.raises(PlanError, match=r"quality\.records: .*missing\.jsonl"):
        read_records([Records(kind="ruler", file=str(tmp_path / "missing.jsonl"))])
