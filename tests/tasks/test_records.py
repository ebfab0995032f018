"""Files of RULER, LongBench and SCBench: read as their authors write them, refused with the place if they are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvwise.tasks.records.base as base
from kvwise.core.errors import TaskError
from kvwise.tasks.records.load import LOADERS, load_records

NEEDLE = "Some text.\nOne of the special magic numbers for a-b is: 12.\nMore.\nWhat is the special magic number for a-b"
RULER = {"index": 0, "input": f"{NEEDLE} mentioned?", "outputs": ["12"], "length": 40, "answer_prefix": " It is"}
LONGBENCH = {
    "input": "Who?",
    "context": "A long {input} text.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 4,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "x",
}
SCBENCH = {
    "id": 0,
    "context": '{"k": "v"}',
    "multi_turns": [{"input": "Key k?", "answer": "v"}, {"input": "Key l?", "answer": ["w", "u"]}],
}
FILES = {
    "ruler": ("niah_single_1.jsonl", RULER),
    "longbench": ("hotpotqa.jsonl", LONGBENCH),
    "scbench": ("scbench_kv.jsonl", SCBENCH),
}


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(params=FILES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ruler(tmp_path: Path) -> None:
    found = load_records("ruler", write(tmp_path / "niah_single_1" / "validation.jsonl", RULER, RULER))
    assert found.name == "ruler/niah_single_1"
    assert len(found.records) == 2
    (question,) = found.records[0].questions
    assert found.records[0].task == "niah_single_1"
    assert found.records[0].context == "Some text.\nOne of the special magic numbers for a-b is: 12.\nMore."
    assert question.prompt == "\nWhat is the special magic number for a-b mentioned? It is"
    assert (question.references, question.max_new_tokens) == (("12",), 128)
    assert found.score("niah_single_1", "12", question.references) == 1


@pytest.mark.parametrize(
    ("task", "text", "asked", "tokens"),
    [
        ("niah_multiquery", "What is it?\nx. What are all the special magic uuids for a?", "\nx. ", 128),
        ("vt", "VAR A = 1 Question: q?\n\nVAR B = 2\nQuestion: Find 2.", "\n\nVAR B = 2", 30),
        ("cwe", "1. a 2. b\nQuestion: What are the 10 words?", "1. a 2. b", 120),
        ("fwe", "coded ... text Question: no newlines here?", "text", 50),
        ("qa_2", "Documents. Question: not this?\n\nQuestion: this?", "not this?", 32),
    ],
)
def test_the_question_is_cut_off_the_end(tmp_path: Path, task: str, text: str, asked: str, tokens: int) -> None:
    record = {**RULER, "input": text}
    del record["answer_prefix"], record["outputs"]
    (found,) = load_records("ruler", write(tmp_path / f"{task}.jsonl", {**record, "output": "x"})).records
    (question,) = found.questions
    assert found.context + question.prompt == text
    assert asked.strip() in found.context
    assert question.prompt.strip().startswith(("Question: ", "What are all"))
    assert question.max_new_tokens == tokens


def test_longbench(tmp_path: Path) -> None:
    found = load_records("longbench", write(tmp_path / "data" / "any name.jsonl", LONGBENCH))
    (record,) = found.records
    (question,) = record.questions
    assert (found.name, record.task) == ("longbench/hotpotqa", "hotpotqa")
    assert record.context.endswith("A long {input} text."), "only the template's own {input} is filled in"
    assert "Question: Who?" in question.prompt
    assert (question.references, question.max_new_tokens) == (("Ada", "Ada Lovelace"), 32)
    assert found.score("hotpotqa", "ada", question.references) == 1


def test_longbench_e_and_classes(tmp_path: Path) -> None:
    line = {**LONGBENCH, "dataset": "trec_e", "answers": ["b"], "all_classes": ["a", "b", "c"]}
    found = load_records("longbench", write(tmp_path / "trec_e.jsonl", line))
    assert found.records[0].task == "trec"
    assert found.score("trec", "b or c", ("b",)) == 0.5


def test_the_authors_prompts_are_used_where_they_lie_beside_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    write(tmp_path / "dataset2prompt.json", {"hotpotqa": "Read {x}: {context}\nNow {input}!", "other": 1})
    (record,) = load_records("longbench", file).records
    assert record.context == "Read {x}: A long {input} text."
    assert record.questions[0].prompt == "\nNow Who?!"
    for prompt in ("no place", "{input} before {context}"):
        write(tmp_path / "dataset2prompt.json", {"hotpotqa": prompt})
        with pytest.raises(TaskError, match=r"dataset2prompt.json: 'hotpotqa' must have \{context\}"):
            load_records("longbench", file)
    (tmp_path / "dataset2prompt.json").write_text("{")
    with pytest.raises(TaskError, match=r"cannot read the prompts in .*mend or remove"):
        load_records("longbench", file)


def test_scbench(tmp_path: Path) -> None:
    found = load_records("scbench", write(tmp_path / "v2_scbench_kv.jsonl", SCBENCH, SCBENCH))
    assert found.name == "scbench/kv"
    assert len(found.records) == 2
    first, second = found.records[0].questions
    assert found.records[0].context.endswith('{"k": "v"}')
    assert first.prompt == "\n\nKey k?"
    assert (first.references, first.max_new_tokens) == (("v",), 150)
    assert second.references == ("w", "u")


def test_scbench_choice(tmp_path: Path) -> None:
    turn = {"input": "Where?", "options": ["Rome", "Paris", "Oslo", "Bern"], "answer": "Paris"}
    found = load_records(
        "scbench", write(tmp_path / "scbench_choice_eng.jsonl", {"context": "c", "multi_turns": [turn]})
    )
    (question,) = found.records[0].questions
    assert "Where?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\n" in question.prompt
    assert question.references == ("Paris", "B")
    turn["answer"] = "Lima"
    with pytest.raises(
        TaskError, match=r"multi_turns\[0\]: field 'options' must hold 4 texts, the answer 'Lima' among"
    ):
        load_records("scbench", write(tmp_path / "scbench_choice_eng.jsonl", {"context": "c", "multi_turns": [turn]}))


def test_scbench_numbers(tmp_path: Path) -> None:
    turns = [{"input": "max?", "answer": 12}, {"input": "mean?", "answer": 12.5}]
    (record,) = load_records(
        "scbench", write(tmp_path / "scbench_mf.jsonl", {"input": "1 2", "multi_turns": turns})
    ).records
    assert [question.references for question in record.questions] == [("12",), ("12.5",)]
    assert record.context == "1 2"
    turns[1]["answer"] = "many"
    with pytest.raises(TaskError, match=r"multi_turns\[1\]: field 'answer' is 'many': it must be a number"):
        load_records("scbench", write(tmp_path / "scbench_mf.jsonl", {"input": "1 2", "multi_turns": turns}))


def test_turns_of_two_tasks_become_two_records(tmp_path: Path) -> None:
    turns: list[dict[str, Any]] = [
        {"task": "scbench_repoqa", "input": "f?", "answer": "def f()", "name": "f"},
        {"task": "scbench_kv", "input": "k?", "answer": "v"},
        {"task": "scbench_repoqa", "input": "g?", "answer": "def g()", "name": "g"},
    ]
    other = [{"task": "scbench_repoqa", "input": "h?", "answer": "def h()", "name": "h"}]
    file = tmp_path / "scbench_repoqa_and_kv.jsonl"
    lines = [{"context": "c", "repo": "r", "multi_turns": turns}, {"context": "d", "repo": "r", "multi_turns": other}]
    code, keys, more = load_records("scbench", write(file, *lines)).records
    assert (code.task, keys.task, more.task) == ("scbench_repoqa", "scbench_kv", "scbench_repoqa")
    assert [q.references for q in code.questions] == [
        ("def f()", "def g()", "def h()"),
        ("def g()", "def f()", "def h()"),
    ]
    assert [q.max_new_tokens for q in (*code.questions, *keys.questions)] == [1024, 1024, 80]
    turns[1]["task"] = "scbench_mf"
    with pytest.raises(TaskError, match="field 'task' is 'scbench_mf': it must be one of scbench_repoqa, scbench_kv"):
        load_records("scbench", write(file, *lines))


def test_limit_reads_no_further(kind: str, tmp_path: Path) -> None:
    name, record = FILES[kind]
    file = write(tmp_path / name, record, record)
    with file.open("a") as out:
        out.write("not JSON\n")
    assert len(load_records(kind, file, limit=2).records) == 2
    with pytest.raises(TaskError, match=r"line 3: not JSON"):
        load_records(kind, file)
    with pytest.raises(TaskError, match="limit=0 leaves no records"):
        load_records(kind, file, limit=0)


def test_blank_lines_and_a_byte_order_mark_are_skipped(kind: str, tmp_path: Path) -> None:
    name, record = FILES[kind]
    (tmp_path / name).write_text(f"\ufeff{json.dumps(record)}\n\n  \n{json.dumps(record)}", encoding="utf-8")
    assert len(load_records(kind, str(tmp_path / name)).records) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no records: it must be a JSONL file"),
        (b"\n \n", "has no records"),
        (b"{", "line 1: not JSON .*one JSON object a line"),
        (b"[1]", "line 1: a list instead of an object"),
        (b"null", "line 1: null instead of an object"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ('{"a": "é"}'.encode("latin-1"), r"line 1: not UTF-8 \(byte 7\); save the file as UTF-8"),
        ("{}".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_what_is_no_jsonl_is_refused(kind: str, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / FILES[kind][0]
    file.write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        load_records(kind, file)
    assert file.name in str(error.value)


def test_what_cannot_be_opened_is_refused(kind: str, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / FILES[kind][0], tmp_path / FILES[kind][0]):
        with pytest.raises(TaskError, match=r"cannot read .*give the path of a JSONL file"):
            load_records(kind, path)
        (tmp_path / FILES[kind][0]).mkdir(exist_ok=True)
    with pytest.raises(TaskError):
        load_records(kind, "a\0b/scbench_kv.jsonl")


def test_what_is_too_large_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, record = FILES[kind]
    file = write(tmp_path / name, record, record, record)
    size = file.stat().st_size
    monkeypatch.setattr(base, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(TaskError, match=r"line 3: more than .*read fewer records with limit="):
        load_records(kind, file)
    assert load_records(kind, file, limit=2)
    monkeypatch.setattr(base, "MAX_LINE_BYTES", size // 3 - 1)
    with pytest.raises(TaskError, match=r"line 1: longer than .*one record a line"):
        load_records(kind, file, limit=2)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("ruler", "input", None, "field 'input' is null: it must be text"),
        ("ruler", "input", "no question", "field 'input' has no question of task 'niah_single_1'"),
        ("ruler", "input", "What is the special magic number for a?", "behind a context"),
        ("ruler", "input", "bad \ud800", "field 'input' has a lone surrogate at character 4"),
        ("ruler", "outputs", [], "field 'outputs' is an empty list"),
        ("ruler", "outputs", [["a"]], "field 'outputs' holds a list: it must hold texts or numbers"),
        ("ruler", "task", "nope", r"its field says 'nope'; .*one of niah_single_1, .*qa_2"),
        ("longbench", "context", 5, "field 'context' is a number"),
        ("longbench", "answers", True, "field 'answers' holds a boolean"),
        ("longbench", "dataset", "nope", r"its field says 'nope'; .*one of narrativeqa, "),
        ("scbench", "context", {}, "field 'context' is an object"),
        ("scbench", "multi_turns", [], "field 'multi_turns' must be a list of objects"),
        ("scbench", "multi_turns", [1], "field 'multi_turns' must be a list of objects"),
        ("scbench", "multi_turns", [{"input": "x"}], r"multi_turns\[0\]: field 'answer' is missing; .*'input'"),
    ],
)
def test_wrong_fields_are_named(kind: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    name, record = FILES[kind]
    file = tmp_path / name
    file.write_text(f"{json.dumps(record)}\n{json.dumps({**record, field: value})}\n")
    with pytest.raises(TaskError, match=message):
        load_records(kind, file)
    if field != "task":
        file.write_text(json.dumps({key: kept for key, kept in record.items() if key != field}))
        with pytest.raises(
            TaskError, match=rf"line 1: field '{'input' if field == 'x' else field}' is missing; the fields"
        ):
            load_records(kind, file)


def test_a_file_of_no_known_task_is_refused(tmp_path: Path) -> None:
    for kind, known in (("ruler", "niah_single_1"), ("scbench", "scbench_kv")):
        file = write(tmp_path / "folder" / "data.jsonl", FILES[kind][1])
        with pytest.raises(TaskError, match=rf"its name and its folder say 'data' and 'folder'; .*{known}"):
            load_records(kind, file)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"unknown kind of records 'rular'; did you mean 'ruler'\? \(known: ruler, long"
    ):
        load_records("rular", tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["input", "answer", "task"]), inner),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, (name, _) in FILES.items()]
    + [("scbench", f"scbench_{task}.jsonl") for task in ("choice_eng", "mf", "repoqa", "summary_with_needles")],
)
def test_nothing_but_a_task_error_is_raised(kind: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        record = dict(FILES[kind][1])
        for field in data.draw(st.lists(st.sampled_from(sorted(record)), max_size=2)):
            record[field] = data.draw(JSON)
        file.write_bytes(data.draw(st.binary(max_size=20) | st.just(json.dumps(record).encode())))
        try:
            found = load_records(kind, file)
        except TaskError:
            return
        for asked in found.records:
            for question in asked.questions:
                for said in ("", "7", data.draw(st.text(max_size=20)), question.references[0]):
                    assert 0 <= found.score(asked.task, said, question.references) <= 1 + 1e-9

    run()


def test_every_loader_is_tested() -> None:
    assert set(LOADERS) == set(FILES)
