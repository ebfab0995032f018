"""What the answers say, in sentences: the same on the page, on the terminal and in JSON."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kvwise.study.findings import (
    CEILING,
    SPECULATION,
    Apart,
    Below,
    EarlyFacts,
    Mark,
    Subject,
    below_ceiling,
    below_guides,
    differ,
    early_facts,
    subjects,
    told_apart,
)
from kvwise.study.palette import is_guide, method, short
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.words import budget, estimate

MANY = 4  # methods told apart on a task, to call the task one that tells methods apart
STUDY = "arXiv 2604.05012"


def findings(qualities: Sequence[QualityFigures]) -> list[tuple[str, list[str]]]:
    """(Heading, sentences) of everything that the answers say; empty without tasks."""
    known = [q for q in qualities if q.basis == Basis.TASKS]
    if not subjects(known):
        return []
    several = len({(q.model, q.context) for q in known}) > 1
    parts = [
        ("Told apart", list(apart_sentences(told_apart(known), several))),
        ("InfiniGen against exact top-k", list(_ceiling_sentences(known, several))),
        ("Early facts", list(_early_sentences(known, several))),
        ("Below a guide", list(_guide_sentences(known, several))),
    ]
    return [(heading, sentences) for heading, sentences in parts if sentences]


def place(subject: Subject, several: bool) -> str:
    """A subject's name; with model and context where a study has several of these."""
    words = subject.task if subject.protocol == "multi-turn" else f"{subject.task} ({subject.protocol})"
    return f"{words} on {short(subject.model)}, context {subject.context}" if several else words


def apart_sentences(found: Sequence[Apart], several: bool) -> Iterator[str]:
    """The headline, and on how many tasks methods are told apart."""
    if not found:
        return
    most = max(found, key=lambda a: (a.subject.higher_is_better, len(a.marks)))
    if len(most.marks) < 2:
        yield "No two methods are told apart on any task"
        return
    many = [a for a in found if len(a.marks) >= MANY]
    yield (
        f"{len(most.marks)} methods told apart on {place(most.subject, several)} at budget {budget(most.budget)}: "
        f"{ranking(most)}"
    )
    names = ", ".join(f"{place(a.subject, several)} at {budget(a.budget)}" for a in many)
    noun = "tasks" if len({a.subject.protocol for a in found}) == 1 else "pairs of task and protocol"
    yield (
        f"{MANY} methods or more are told apart on {len(many)} of {len(found)} {noun}" + (f": {names}" if many else "")
    )


def ranking(apart: Apart) -> str:
    """Methods told apart, best first."""
    mark = " > " if apart.subject.higher_is_better else " < "
    return mark.join(f"{m.who.framework} {estimate(m.estimate)}" for m in apart.marks)


def _against(below: Below) -> str:
    return f"{estimate(below.mark.estimate)} against {estimate(below.other.estimate)}"


def _ceiling_sentences(known: Sequence[QualityFigures], several: bool) -> Iterator[str]:
    pairs = below_ceiling(known)
    names = {method(q.who.framework) for q in known}
    if not pairs:
        if SPECULATION in names:
            missing = "was not measured" if CEILING not in names else "shares no budget with it"
            yield f"Exact top-k {missing}, so InfiniGen has nothing to be held against"
        return
    clear = [b for b in pairs if b.clear]
    if clear:
        asked = len({b.subject for b in pairs})
        noun = "tasks" if len({b.subject.protocol for b in pairs}) == 1 else "pairs of task and protocol"
        groups = list(_by_task(clear, several))
        yield f"InfiniGen falls below exact top-k beyond the error on {len(groups)} of {asked} {noun}"
        yield from groups
        return
    largest = pairs[0]
    where = f"{place(largest.subject, several)} at {budget(largest.mark.who.budget)}"
    yield (
        "InfiniGen falls below exact top-k nowhere beyond the error; "
        + (f"the largest difference is {largest.by:.2f}, on {where} ({_against(largest)})"
           if largest.by > 0 else "it is at least as good everywhere")
    )  # fmt: skip


def _early_sentences(known: Sequence[QualityFigures], several: bool) -> Iterator[str]:
    """Whether the ranking holds, by budget; then the figures."""
    tasks: dict[Subject, list[EarlyFacts]] = defaultdict(list)
    for found in early_facts(known):
        tasks[found.subject].append(found)
    for subject, here in tasks.items():
        grounds: dict[str, list[str]] = defaultdict(list)
        for found in here:
            grounds[_order(found)].append(budget(found.dropping.who.budget))
        for ground, budgets in grounds.items():
            yield f"{place(subject, several)} at {_and(budgets)}: {ground}"
        for found in here:
            marks = (("full", found.full), ("InfiniGen", found.speculation), ("H2O", found.dropping))
            told = ", ".join(f"{name} {estimate(mark.estimate)}" for name, mark in marks)
            yield f"{place(subject, several)} at {budget(found.dropping.who.budget)}: {told}"


def _order(found: EarlyFacts) -> str:
    order = f"full ≥ InfiniGen > H2O, the order that {STUDY} found"
    if found.full_holds and found.speculation_holds:
        below = differ(found.full.estimate, found.speculation.estimate)
        return order + (", with InfiniGen below the full cache beyond the error" if below else "")
    wrong = []
    if not found.full_holds:
        wrong.append("InfiniGen is above the full cache beyond the error")
    if not found.speculation_holds:
        wrong.append(f"InfiniGen {_relation(found.speculation, found.dropping)} H2O")
    return f"not {order}: {' and '.join(wrong)}"


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _relation(a: Mark, b: Mark) -> str:
    if not differ(a.estimate, b.estimate):
        return "is not told apart from"
    return "is above" if a.estimate.value > b.estimate.value else "is below"


def _guide_sentences(known: Sequence[QualityFigures], several: bool) -> Iterator[str]:
    if not any(is_guide(q.who.framework) for q in known):
        return
    pairs: dict[tuple[str, str], list[Below]] = defaultdict(list)
    for below in below_guides(known):
        pairs[below.mark.who.framework, below.other.who.framework].append(below)
    for (name, guide), found in pairs.items():
        worst, *others = list(dict.fromkeys(b.subject for b in found))
        phrase = next(_by_task([b for b in found if b.subject == worst], several))
        also = f"; also on {_and([place(subject, several) for subject in others])}" if others else ""
        yield f"{name} is worse than {guide} on {phrase}{also}"
    if not pairs:
        yield "No method falls below the random or window guide beyond the error"


def _by_task(found: Sequence[Below], several: bool) -> Iterator[str]:
    """A phrase per task: the budgets, and the figures where the difference is largest."""
    tasks: dict[Subject, list[Below]] = defaultdict(list)
    for below in found:
        tasks[below.subject].append(below)
    for subject, here in tasks.items():
        worst = here[0]
        others = sorted({b.mark.who.budget or 1.0 for b in here} - {worst.mark.who.budget})
        unit = "" if subject.higher_is_better else " nats"
        also = f", also at {_and(list(map(budget, others)))}" if others else ""
        yield (
            f"{place(subject, several)} at {budget(worst.mark.who.budget)} by {worst.by:.2f}{unit} "
            f"({estimate(worst.mark.estimate)} against {estimate(worst.other.estimate)}){also}"
        )
