"""What the answers say: methods told apart as by hand, who falls below whom, the ranking of early facts."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.study.estimate import Estimate
from kvwise.study.findings import (
    Mark,
    Subject,
    below_ceiling,
    below_guides,
    clique,
    differ,
    early_facts,
    subjects,
    told_apart,
)
from kvwise.study.quality_words import apart_sentences, findings
from kvwise.study.scores import QualityFigures, TaskFigures
from kvwise.study.summary import Study, Who
from tests.study.answers import BUDGETS, TASKS, make_study

GRADED = Subject("m", 512, "recall", "multi-turn", True)
NATS = replace(GRADED, task="continuation", higher_is_better=False)


def mark(name: str, value: float, error: float = 0.02, budget: float | None = 0.25) -> Mark:
    return Mark(Who(name, budget, name), Estimate(value, error, 100))


def quality(name: str, budget: float | None, tasks: dict[str, Estimate]) -> QualityFigures:
    asked = tuple(TaskFigures(task, "multi-turn", 100, 10, e, None, None, None) for task, e in tasks.items())
    text = name if budget is None else f"{name}(budget={budget:g})"
    return QualityFigures("m", 512, Who(name, budget, text), asked, None, None, None, {})


def early(full: float, infinigen: float, h2o: float, error: float = 0.02) -> list[QualityFigures]:
    given = (("full", None, full), ("infinigen", 0.2, infinigen), ("h2o", 0.2, h2o))
    return [quality(name, budget, {"early_fact": Estimate(value, error, 100)}) for name, budget, value in given]


def sentences(found: list[QualityFigures]) -> str:
    return "\n".join(text for _, texts in findings(found) for text in texts)


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


def test_two_figures_differ_beyond_1_96_combined_errors() -> None:
    # sqrt(0.03^2 + 0.04^2) = 0.05, and 1.96 of that is 0.098.
    assert differ(Estimate(0.5, 0.03, 9), Estimate(0.599, 0.04, 9))
    assert not differ(Estimate(0.5, 0.03, 9), Estimate(0.597, 0.04, 9))


def test_methods_told_apart_are_those_found_by_hand() -> None:
    # 1.96 * sqrt(2) * 0.02 = 0.0554: b is within that of a, and d of c; e is apart from c.
    marks = [mark("c", 0.80), mark("a", 0.95), mark("b", 0.91), mark("e", 0.70), mark("d", 0.77)]
    assert [m.who.framework for m in clique(GRADED, marks)] == ["a", "c", "e"]
    # Fewer nats are better: the other way round, the least first.
    assert [m.who.framework for m in clique(NATS, marks)] == ["e", "d", "b"]


marks = st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 0.3)), min_size=1, max_size=8)


@given(marks, st.booleans())
def test_a_clique_is_pairwise_apart_and_cannot_grow(drawn: list[tuple[float, float]], higher: bool) -> None:
    everyone = [mark(str(i), value, error) for i, (value, error) in enumerate(drawn)]
    taken = clique(replace(GRADED, higher_is_better=higher), everyone)
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[i + 1 :]]
    assert all(differ(a.estimate, b.estimate) for a, b in pairs)
    assert all(any(not differ(m.estimate, t.estimate) for t in taken) for m in everyone if m not in taken)


def test_the_headline_names_task_budget_and_methods_in_order(study: Study) -> None:
    found = told_apart(study.qualities)
    assert {a.subject.task for a in found} == {*TASKS, "continuation"}
    assert all(a.rivals == 6 for a in found)
    recall = next(a for a in found if a.subject.task == "recall")
    by_hand = [clique(recall.subject, [m for m in subjects(study.qualities)[recall.subject] if m.who.budget == b])
               for b in BUDGETS]  # fmt: skip
    assert len(recall.marks) == max(map(len, by_hand)) >= 4
    first, second = apart_sentences(found, several=False)
    assert first.startswith(f"{max(len(a.marks) for a in found if a.subject.higher_is_better)} methods told apart on ")
    assert "topk 0.9" in first
    assert "4 methods or more are told apart on 7 of 7 tasks: recall at " in second


def test_where_infinigen_falls_below_exact_top_k(study: Study) -> None:
    found = below_ceiling(study.qualities)
    assert len(found) == 7 * len(BUDGETS)
    worst = found[0]
    assert (worst.subject.task, worst.mark.who.budget, worst.clear) == ("tracking", 0.06, True)
    # Right answers are a whole number of 288.
    assert math.isclose(worst.by, (round(288 * 0.93**2.2) - round(288 * 0.55**2.2)) / 288)
    assert not any(b.clear for b in found if b.mark.who.budget == 0.5)
    text = sentences(study.qualities)
    assert "InfiniGen falls below exact top-k beyond the error on 7 of 7 tasks" in text
    assert "tracking at 6 % by 0.59 (0.27 ± 0.03 against 0.85 ± 0.02), also at 12.5 % and 25 %" in text


def test_nowhere_and_not_measured_are_said_too() -> None:
    pair = [quality("topk", 0.2, {"recall": Estimate(0.92, 0.02, 9)})]
    pair.append(quality("infinigen", 0.2, {"recall": Estimate(0.9, 0.02, 9)}))
    assert "nowhere beyond the error; the largest difference is 0.02, on recall at 20 %" in sentences(pair)
    assert "Exact top-k was not measured" in sentences(pair[1:])
    assert "shares no budget with it" in sentences([pair[1], quality("topk", 0.5, {"recall": Estimate(1, 0.1, 9)})])
    assert "top-k" not in sentences(pair[:1])


def test_methods_below_a_guide_are_named_and_guides_are_not(study: Study) -> None:
    found = below_guides(study.qualities)
    assert {b.mark.who.framework for b in found} == {"h2o"}
    assert {b.mark.who.budget for b in found} == {0.125, 0.06}
    assert all((b.mark.estimate.value < b.other.estimate.value) is b.subject.higher_is_better for b in found)
    assert "h2o is worse than random on counting at 6 % by 0.14" in sentences(study.qualities)
    good = [q for q in study.qualities if q.who.framework in ("random", "topk")]
    assert "No method falls below the random or window guide beyond the error" in sentences(good)


@pytest.mark.parametrize(
    ("full", "infinigen", "h2o", "said"),
    [
        (1.0, 0.98, 0.4, "early_fact at 20 %: full ≥ InfiniGen > H2O, the order that arXiv 2604.05012 found"),
        (1.0, 0.8, 0.4, "found, with InfiniGen below the full cache beyond the error"),
        (1.0, 0.5, 0.48, "not full ≥ InfiniGen > H2O, the order that arXiv 2604.05012 found: InfiniGen is not told"),
        (1.0, 0.3, 0.9, "2604.05012 found: InfiniGen is below H2O"),
        (0.5, 0.9, 0.4, "2604.05012 found: InfiniGen is above the full cache beyond the error"),
    ],
)
def test_early_facts_are_compared_with_the_study(full: float, infinigen: float, h2o: float, said: str) -> None:
    text = sentences(early(full, infinigen, h2o))
    assert said in text
    assert f"full {full:.2f} ± 0.02, InfiniGen {infinigen:.2f} ± 0.02, H2O {h2o:.2f} ± 0.02" in text
    (found,) = early_facts(early(full, infinigen, h2o))
    holds = found.full_holds and found.speculation_holds
    assert holds is ("not full" not in text)


def test_agreement_says_nothing_about_answers(study: Study) -> None:
    same = [replace(q, basis="agreement") for q in study.qualities]
    assert subjects(same) == {}
    assert findings(same) == []


def test_a_budget_of_everything_says_nothing_about_a_choice(study: Study) -> None:
    whole = [replace(q, who=replace(q.who, budget=1.0)) for q in study.qualities if q.who.budget == 0.06]
    full = [q for q in study.qualities if q.who.strategy == "full"]
    assert not told_apart(full + whole)
    assert not below_guides(full + whole)
    assert not list(early_facts(full + whole))
    assert below_ceiling(full + whole)  # InfiniGen chooses even then


def test_one_method_is_told_apart_from_nothing() -> None:
    alone = quality("h2o", 0.25, {"recall": Estimate(0.5, 0.01, 100)})
    assert list(apart_sentences(told_apart([alone]), several=False)) == ["No two methods are told apart on any task"]
