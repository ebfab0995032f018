"""Scores worked out by hand from the definitions of the benchmarks."""

import builtins
from typing import Any

import pytest

from kvwise.core.errors import TaskError
from kvwise.tasks.records.longbench import LongBenchScore, class_score
from kvwise.tasks.records.ruler import score_ruler
from kvwise.tasks.records.scbench import score_scbench
from kvwise.tasks.records.scores import bare_chinese, bleu, common_subsequence, edit_similarity, rouge_l, rouge_lsum

LONGBENCH = LongBenchScore(("location", "city location", "number"))


def test_common_subsequence() -> None:
    assert common_subsequence("abcde", "xaybze") == [(0, 1), (1, 3), (4, 5)]
    assert common_subsequence("ab", "ba") == [(0, 1)], "the last of the first is given up"
    assert common_subsequence("", "a") == common_subsequence("ab", "cd") == []


def test_rouge_l_counts_different_words_sentence_by_sentence() -> None:
    # {the, cat} and {on, mat}: 4 of 6 different words said, 4 of 5 to be said
    assert rouge_l("the cat sat. on a mat", "the cat lay on the mat.") == pytest.approx(8 / 11)
    assert rouge_l("a b", "a b") == pytest.approx(1)
    # the line break behind the last full stop is a sentence of one empty word: 2 of 3
    assert rouge_l("a b.\n", "a b") == pytest.approx(0.8)
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("b", "a") == 0


def test_rouge_lsum() -> None:
    # Lin 2004, section 3.2: the union is w1 w2 w3 w5; 4 of 10 words said, 4 of 5 to be said
    assert rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(8 / 15)
    assert rouge_lsum("a", "a a\na") == pytest.approx(2 / 4), "one `a` said counts once"
    assert rouge_lsum("The CAT-sat!", "the cat sat") == pytest.approx(1)
    assert rouge_lsum("...", "a") == rouge_lsum("a", "") == 0


def test_bleu() -> None:
    assert bleu("a b c d", "a b c d") == pytest.approx(1)
    assert bleu("a b c d e", "a b c d f") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert bleu("a b c d", "a b c d e f g h") == pytest.approx(0.36787944)
    assert bleu("a b", "a c") == pytest.approx(0.0675444, rel=1e-4)  # 1/2, then ln 2 / 10, / 20, / 40
    assert bleu("x y", "a b") == bleu("", "a") == bleu("a", "a") == 0


def test_edit_similarity() -> None:
    assert edit_similarity("abcd", "bcde") == 0.75
    assert edit_similarity("return a + b", "return a+b") == 0.91
    assert edit_similarity("", "") == 1


def test_bare_chinese() -> None:
    assert bare_chinese("你好，「世 界」！ABC—…《.") == "你好世界abc《"


@pytest.mark.parametrize(
    ("task", "prediction", "references", "score"),
    [
        ("niah_single_1", "The number is 1234567.", ("1234567",), 1),
        ("niah_multivalue", "123 and 456", ("123", "456", "789", "000"), 0.5),
        ("vt", "abcde, FGHIJ", ("ABCDE", "FGHIJ", "KLMNO"), 2 / 3),
        ("cwe", "1. Tree\x002. river", ("tree", "river"), 1),
        ("fwe", "", ("x",), 0),
        ("qa_1", "In Paris, I think", ("London", "PARIS"), 1),
        ("qa_2", "In Rome", ("London", "Paris"), 0),
    ],
)
def test_ruler(task: str, prediction: str, references: tuple[str, ...], score: float) -> None:
    assert score_ruler(task, prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("task", "prediction", "references", "score"),
    [
        ("hotpotqa", "The cat sat", ("a dog", "a cat sat down"), 0.8),  # cat sat against cat sat down
        ("narrativeqa", "", ("x",), 0),
        ("triviaqa", "\nParis\nQuestion: next", ("paris",), 1),
        ("gov_report", "the cat sat. on a mat", ("the cat lay on the mat.",), 8 / 11),
        ("samsum", "a b\nc d", ("a b",), 1),
        ("trec", "city location\nnumber", ("city location",), 1),
        ("trec", "number or location", ("number",), 0.5),
        ("trec", "none of it", ("number",), 0),
        ("passage_count", "There are 7, or 8, or 7", ("7",), 2 / 3),
        ("passage_count", "many", ("7",), 0),
        ("passage_retrieval_en", "Paragraph 3 or 4", ("Paragraph 3",), 0.5),
        ("passage_retrieval_zh", "段落12", ("段落12",), 1),
        ("lcc", "\n# note\n```\nreturn a + b\nmore", ("return a+b",), 0.91),
        ("repobench-p", "// only a comment", ("x = 1",), 0),
        ("multifieldqa_zh", "北京大学。", ("北京大学",), 1),
        ("multifieldqa_zh", "他来到了北京", ("北京",), 0.4),  # 他 来到 了 北京: 1 of 4, 1 of 1
        ("dureader", "我来到北京", ("我来到上海",), 2 / 3),  # 我 来到 of three words each
    ],
)
def test_longbench(task: str, prediction: str, references: tuple[str, ...], score: float) -> None:
    assert LONGBENCH(task, prediction, references) == pytest.approx(score)


def test_the_class_behind_one_taken_off_stays() -> None:
    # loc is taken off, location is passed over, city location is right: one of two
    assert class_score("city location", "city location", ("loc", "location", "city location")) == 0.5


@pytest.mark.parametrize(
    ("task", "prediction", "references", "score"),
    [
        ("kv", "it is 8f-3e.", ("8f-3e",), 1),
        ("kv", "it is 8F-3E.", ("8f-3e",), 0),
        ("vt", "abc def", ("ABC", "DEF", "GHI"), 0.67),
        ("passkey", "The pass key is 4711, not 12", ("4711",), 1),
        ("passkey", "12 or 4711", ("4711",), 0),
        ("mf", "about 12.9 or so", ("12",), 1),
        ("mf", "about 12.9 or so", ("12.9",), 1),
        ("mf", "0012", ("12",), 1),
        ("mf", "0", ("0",), 1),
        ("mf", "13", ("12",), 0),
        ("mf", "none", ("12",), 0),
        ("mf", "9" * 400, ("12.5",), 0),
        ("many_shot", "it is (b)", ("(B)",), 1),
        ("qa_eng", "MRS. SMITH", ("Mr. Jones", "mrs. smith"), 1),
        ("qa_chn", "你好", ("你们", "他"), 0.5),
        ("choice_eng", "B. Paris", ("Paris", "B"), 1),
        ("choice_eng", "Paris", ("Paris", "B"), 1),
        ("choice_eng", "A", ("Paris", "B"), 0),
        ("choice_eng", 'The answer is:  "B"', ("Paris", "B"), 1),
        ("choice_eng", "The answer is: A or B", ("Paris", "B"), 0),
        ("choice_eng", "It is (C) B", ("Paris", "B"), 1),
        ("choice_eng", "the answer is:", ("Paris", "B"), 0),
        ("choice_eng", "nothing", ("Paris", "B"), 0),
        ("choice_eng", " ", ("Paris", "B"), 0),
        ("summary", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", ("w1 w2 w3 w4 w5",), 8 / 15),
        (
            "repoqa",
            "Sure:\n```python\ndef f(x):\n    return x + 1\n```\n",
            ("def f(x):\n    return x + 1", "def g()"),
            1,
        ),
        ("repoqa", "def g(y): return y", ("def f(x): return x", "def g(y): return y"), 0),
        ("repoqa", "def f(x): return x and so on and on", ("def f(x): return x",), 0),  # similar, but not enough
    ],
)
def test_scbench(task: str, prediction: str, references: tuple[str, ...], score: float) -> None:
    assert score_scbench(f"scbench_{task}", prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(("score", "known"), [(score_ruler, "niah_"), (LONGBENCH, "hotpotqa"), (score_scbench, "kv")])
def test_unknown_tasks_are_named_with_the_known_ones(score: Any, known: str) -> None:
    with pytest.raises(TaskError, match=rf"no (task|dataset) 'nope' \(known: .*{known}"):
        score("nope", "x", ("x",))


def test_chinese_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "rjieba":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TaskError, match=r"pip install 'kvwise\[records\]'"):
        LONGBENCH("dureader", "北京", ("北京",))
    assert score_scbench("scbench_qa_chn", "北京", ("北京",)) == 1
