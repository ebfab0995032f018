"""What the answers say: which methods are told apart, who falls below whom, and how early facts rank."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvwise.study.cells import REFERENCE
from kvwise.study.estimate import Estimate, Z
from kvwise.study.palette import GUIDES, is_guide, method
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.who import Who

EARLY_FACT = "early_fact"
SPECULATION, CEILING, DROPPING = "infinigen", "topk", "h2o"


@dataclass(frozen=True, slots=True)
class Subject:
    """A task under a protocol, on one model and context length. Without right answers `higher_is_better` is False."""

    model: str
    context: int
    task: str
    protocol: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """What one strategy got in a subject: accuracy, or nats per answer token."""

    who: Who
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Apart:
    """Strategies of one budget that are pairwise told apart in a subject, best first; `rivals`: of how many."""

    subject: Subject
    budget: float
    marks: tuple[Mark, ...]
    rivals: int


@dataclass(frozen=True, slots=True)
class Below:
    """`mark` is worse than `other` at the same budget in a subject. `clear`: by more than the error."""

    subject: Subject
    mark: Mark
    other: Mark
    clear: bool

    @property
    def by(self) -> float:
        """How much worse, above 0."""
        return _lead(self.subject, self.other, self.mark)


@dataclass(frozen=True, slots=True)
class EarlyFacts:
    """Early facts at one budget: the full cache, InfiniGen and H2O.

    `full_holds`: InfiniGen is not above the full cache beyond the error; `speculation_holds`: InfiniGen is above H2O
    beyond the error. Both together are the order that arXiv 2604.05012 found.
    """

    subject: Subject
    full: Mark
    speculation: Mark
    dropping: Mark

    @property
    def full_holds(self) -> bool:
        """Full >= InfiniGen."""
        ahead = self.speculation.estimate.value > self.full.estimate.value
        return not (ahead and differ(self.full.estimate, self.speculation.estimate))

    @property
    def speculation_holds(self) -> bool:
        """InfiniGen > H2O."""
        ahead = self.speculation.estimate.value > self.dropping.estimate.value
        return ahead and differ(self.speculation.estimate, self.dropping.estimate)


def differ(a: Estimate, b: Estimate) -> bool:
    """Whether two figures are further apart than 1.96 combined standard errors.

    The errors are combined as if the answers were independent; they are to the same questions, so that this asks for
    more than it must.
    """
    return abs(a.value - b.value) > Z * math.hypot(a.error, b.error)


def subjects(qualities: Sequence[QualityFigures]) -> dict[Subject, list[Mark]]:
    """Every task that was measured, with what each strategy got; agreement is none."""
    out: dict[Subject, list[Mark]] = defaultdict(list)
    for q in qualities:
        for task in q.tasks if q.basis == Basis.TASKS else ():
            found = task.accuracy or task.nll
            if found is not None:
                subject = Subject(q.model, q.context, task.task, task.protocol, task.accuracy is not None)
                out[subject].append(Mark(q.who, found))
    return dict(out)


def told_apart(qualities: Sequence[QualityFigures]) -> list[Apart]:
    """Per subject the budget at which most strategies are pairwise told apart, and which these are."""
    out = []
    for subject, marks in subjects(qualities).items():
        found = [Apart(subject, b, clique(subject, same), len(same)) for b, same in _by_budget(marks).items()]
        if found:
            out.append(max(found, key=lambda apart: (len(apart.marks), _spread(apart.marks))))
    return out


def clique(subject: Subject, marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Marks that pairwise differ by more than the error, chosen greedily.

    The best is taken first; then, going down, each that differs from all that are taken.
    """
    taken: list[Mark] = []
    for mark in sorted(marks, key=lambda m: m.estimate.value, reverse=subject.higher_is_better):
        if all(differ(mark.estimate, other.estimate) for other in taken):
            taken.append(mark)
    return tuple(taken)


def below_ceiling(qualities: Sequence[QualityFigures]) -> list[Below]:
    """InfiniGen against exact top-k, wherever both were measured at one budget; the largest loss of answers first."""
    found = [
        Below(subject, mark, other, _lead(subject, other, mark) > 0 and differ(mark.estimate, other.estimate))
        for subject, marks in subjects(qualities).items()
        for same in _by_budget(marks, whole=True).values()
        for mark in _of(same, SPECULATION)
        for other in _of(same, CEILING)
    ]
    return sorted(found, key=_gravity)


def below_guides(qualities: Sequence[QualityFigures]) -> list[Below]:
    """Methods that do clearly worse than a guide, which looks at nothing, with the same budget."""
    found = [
        Below(subject, mark, guide, clear=True)
        for subject, marks in subjects(qualities).items()
        for same in _by_budget(marks).values()
        for name in GUIDES
        for guide in _of(same, name)
        for mark in same
        if not is_guide(mark.who.framework)
        and _lead(subject, guide, mark) > 0
        and differ(mark.estimate, guide.estimate)
    ]
    return sorted(found, key=_gravity)


def early_facts(qualities: Sequence[QualityFigures]) -> Iterator[EarlyFacts]:
    """The ranking of full cache, InfiniGen and H2O in early-fact retention, wherever all three were measured."""
    for subject, marks in subjects(qualities).items():
        full = next((m for m in marks if m.who.strategy == REFERENCE), None)
        if method(subject.task) != EARLY_FACT or full is None:
            continue
        for same in _by_budget(marks).values():
            speculation = [m for m in same if m.who.framework == SPECULATION]
            dropping = [m for m in same if m.who.framework == DROPPING]
            if speculation and dropping:
                yield EarlyFacts(subject, full, speculation[0], dropping[0])


def _by_budget(marks: Sequence[Mark], *, whole: bool = False) -> dict[float, list[Mark]]:
    """Marks per budget, from large to small; what has no budget is left out.

    So is a budget of everything, at which there is nothing to choose, unless `whole` (InfiniGen chooses even then).
    """
    out: dict[float, list[Mark]] = defaultdict(list)
    for mark in marks:
        if mark.who.budget is not None and (whole or mark.who.budget < 1):
            out[mark.who.budget].append(mark)
    return dict(sorted(out.items(), reverse=True))


def _of(marks: Sequence[Mark], name: str) -> list[Mark]:
    return [mark for mark in marks if method(mark.who.framework) == name]


def _lead(subject: Subject, ahead: Mark, behind: Mark) -> float:
    """By how much `ahead` is better; below 0 if it is worse."""
    difference = ahead.estimate.value - behind.estimate.value
    return difference if subject.higher_is_better else -difference


def _gravity(below: Below) -> tuple[bool, float]:
    """Sorts lost answers before lost nats, the most first."""
    return not below.subject.higher_is_better, -below.by


def _spread(marks: Sequence[Mark]) -> float:
    return abs(marks[0].estimate.value - marks[-1].estimate.value)
