"""What page, terminal and JSON say of quality: tables, sentences, the floor; also without traffic or without tasks."""

import json
import re
from io import StringIO

import pytest
from rich.console import Console

from kvwise.study.compare import compare
from kvwise.study.page import render
from kvwise.study.quality_words import findings
from kvwise.study.recommend import judge
from kvwise.study.scores import quality_figures
from kvwise.study.summary import Study
from kvwise.study.table import as_values, print_study
from tests.study.answers import (
    PLAN,
    agreement_rows,
    answer_rows,
    cell_row,
    held_by,
    make_plan,
    make_study,
    strategies,
)
from tests.study.test_report import text_of


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(make_plan(PLAN).model_copy(update={"min_quality": 0.9}))


@pytest.fixture(scope="module")
def page(study: Study) -> str:
    return render(study, judge(study))


def rows_of(page: str) -> list[list[str]]:
    """The cells of every row of the page's tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [[re.sub(r"<[^>]+>", " ", c).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in rows]


def shown(study: Study) -> str:
    stream = StringIO()
    print_study(Console(width=220, file=stream), study, judge(study))
    return stream.getvalue()


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]+)</h2>", page)


def test_quality_stands_right_behind_the_verdict(page: str) -> None:
    assert headings(page)[:3] == ["Verdict: what to run", "Quality", "Throughput against latency"]
    words = text_of(page)
    assert "Quality is the share of right answers of builtin:recall in 6 tasks (recall, multi_value" in words
    assert "over 512 tokens of context" in words
    assert "compressed without the question in sight" in words
    assert "one after another on the compressed cache (multi-turn)" in words
    assert "nothing in it is right or wrong: continuation (nats per token)" in words


def test_the_table_holds_score_memory_and_every_task(study: Study, page: str) -> None:
    row = next(r for r in rows_of(page) if r and r[0] == "infinigen 12.5%" and len(r) == 11)
    q = next(q for q in study.qualities if q.who.label == "infinigen 12.5%")
    assert q.score is not None
    assert row[1] == f"{q.score.value:.3f} ± {q.score.error:.3f}"
    assert row[2:4] == ["28 B", "512 B"]
    assert row[4] == "0.85 ± 0.02"
    assert "288 answers" in text_of(page)


def test_all_sentences_are_on_the_page_the_terminal_and_in_json(study: Study, page: str) -> None:
    words, terminal = text_of(page).replace("&gt;", ">").replace("&lt;", "<"), " ".join(shown(study).split())
    values = json.loads(json.dumps(as_values(study, judge(study)), allow_nan=False))
    found = findings(study.qualities)
    assert [heading for heading, _ in found] == list(values["findings"])
    assert len(found) == 4
    for heading, sentences in found:
        assert values["findings"][heading] == sentences
        for sentence in sentences:
            assert sentence in words
            assert sentence in terminal


def test_the_floor_is_told_with_scores_errors_and_who_would_have_won(study: Study, page: str) -> None:
    words, terminal = text_of(page), shown(study)
    for told in (words, terminal):
        assert "eft out by the quality floor of 0.9" in told
        assert "h2o 50%: score 0.72 ± 0.01" in told
        assert "right answers over the full cache's, 6 tasks, 1,728 answers, context 512" in told.replace("&#x27;", "'")
        assert "without the floor: tie: h2o 6%, h2o 12.5%" in told
        assert "without the quality floor: h2o 12.5%" in told
    values = as_values(study, judge(study))
    assert values["min_quality"] == 0.9
    rejected = {r["strategy"]: r for r in values["rejected"]}
    assert set(rejected) == {*(f"h2o(budget={b:g})" for b in (0.5, 0.25, 0.125, 0.06)),
                             "infinigen(budget=0.125)", "infinigen(budget=0.06)"}  # fmt: skip
    assert rejected["h2o(budget=0.5)"]["basis"] == "tasks"
    assert 0 < rejected["h2o(budget=0.5)"]["error"] < 0.05
    assert values["decisions"][0]["below_floor"] == [f.who.strategy for f in judge(study).decisions[0].below_floor]
    assert values["recommendations"][0]["without_floor"] == "h2o(budget=0.125)"
    assert len(values["quality"]) == len(study.qualities)


def test_a_floor_nobody_misses_and_one_nobody_reaches() -> None:
    low = make_study(make_plan(PLAN).model_copy(update={"min_quality": 0.01}))
    assert "every strategy reaches it" in text_of(render(low, judge(low)))
    high = make_study(make_plan(PLAN).model_copy(update={"min_quality": 1.0}))
    high.figures = [f for f in high.figures if f.who.framework == "h2o"]
    assert "No strategy reaches the quality floor on builtin:recall: nothing to recommend" in text_of(
        render(high, judge(high))
    )


def test_without_traffic_there_is_a_page_and_no_command_to_run() -> None:
    only = make_study(make_plan(PLAN).model_copy(update={"quality_only": True}), live=False)
    page = render(only, judge(only))
    assert headings(page) == ["Verdict", "Quality", "What was held fixed", "Failed cells", "Provenance"]
    words = text_of(page)
    assert "Only quality was measured" in words
    assert "kvwise generate" not in words
    assert "traffic, main" not in words
    terminal = shown(only)
    assert "topk 6%" in terminal
    assert "TTFT" not in terminal
    assert "Verdict" not in terminal


def random_only() -> Study:
    chosen = [(who, accuracy) for who, accuracy in strategies() if who.framework in ("full", "h2o")]
    rows = [row for who, _ in chosen for row in agreement_rows(who, "random:3m")]
    cells = [cell_row(who, held_by(who), model="random:3m", context=256) for who, _ in chosen]
    return Study("s", make_plan(PLAN), cells, [], [], rows, [], qualities=quality_figures(rows, cells))


def test_random_weights_have_agreement_which_is_called_no_quality() -> None:
    given = random_only()
    page = render(given, judge(given))
    assert "Quality" not in headings(page)
    assert "Agreement with the full cache" in headings(page)
    words = text_of(page)
    assert "3m: random weights, so there are no answers to know" in words
    assert "a distance between logits and no quality" in words
    assert "4 prompts" in words
    assert "Told apart" not in words
    assert "a distance, and no quality" in shown(given)


def test_one_budget_has_a_table_and_no_curve() -> None:
    chosen = [(who, a) for who, a in strategies() if who.budget in (None, 0.25)]
    rows = [row for who, a in chosen for row in answer_rows(who, {"recall": a}, episodes=6, questions=4)]
    cells = [cell_row(who, {}) for who, _ in chosen]
    given = Study("s", make_plan(PLAN), cells, [], [], rows, [], qualities=quality_figures(rows, cells))
    page = render(given, judge(given))
    assert "Quality" in headings(page)
    assert "24 answers" in text_of(page)
    assert 'class="plot"' not in page


def test_quality_is_compared_between_studies(study: Study) -> None:
    worse = make_study()
    changed = [row | {"right": False} if row["framework"] == "topk" and row["task"] == "recall" else row
               for row in worse.answers]  # fmt: skip
    worse.qualities = quality_figures(changed, worse.cells)
    found = [c for c in compare(study, worse) if c.where == "quality, context 512"]
    assert {c.figure for c in found if c.better is not None} == {"score", "recall, multi-turn"}
    assert {c.strategy.partition("(")[0] for c in found if c.better is False} == {"topk"}
    assert all(c.better is None for c in compare(study, study))
