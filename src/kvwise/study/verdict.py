"""The verdict: who wins under each condition and by what, where the winner changes, and what to run."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from kvwise.study.bootstrap import Interval
from kvwise.study.plan import Plan
from kvwise.study.summary import Condition, Figures, QualityFigures


class Measure(StrEnum):
    """What decides, in this order: the next one only among those that tie in the ones before."""

    GOODPUT = "goodput"
    THROUGHPUT = "throughput"
    LATENCY = "latency"


UNITS = {Measure.GOODPUT: "good req/s", Measure.THROUGHPUT: "tok/s", Measure.LATENCY: "ms to the last token (median)"}


@dataclass(frozen=True, slots=True)
class Decision:
    """Who wins under one condition. `winner` is None on a tie of `tied`, or if nobody reaches the quality floor.

    `below_floor` are those the floor leaves out; `without_floor` is the decision without it, if another one.
    """

    condition: Condition
    winner: Figures | None
    by: Measure | None
    runner_up: Figures | None
    tied: tuple[Figures, ...]
    below_floor: tuple[Figures, ...] = ()
    without_floor: "Decision | None" = None

    @property
    def pick(self) -> Figures | None:
        """The winner; of those that tie, the one of the best quality, then the one that holds least KV."""
        if self.winner is not None or not self.tied:
            return self.winner
        return max(self.tied, key=lambda f: (score_of(f), -f.mean_kv.get("device", 0.0)))


@dataclass(frozen=True, slots=True)
class Crossover:
    """Along `axis` the winner changes between two neighbouring conditions."""

    axis: str
    before: Decision
    after: Decision


@dataclass(frozen=True, slots=True)
class BudgetCrossover:
    """Framework `framework` beats `other` at budget `wins` and no longer at the neighbouring budget `fails`."""

    condition: Condition
    framework: str
    other: Figures
    wins: float
    fails: float


def decide(group: Sequence[Figures], plan: Plan) -> Decision:
    """The winner among strategies that were run under one condition and reach the plan's quality floor."""
    free = _decide(group, group[0].condition, plan)
    below = tuple(f for f in group if not reaches(f.quality, plan.min_quality))
    if not below:
        return free
    allowed = [f for f in group if reaches(f.quality, plan.min_quality)]
    held = replace(_decide(allowed, group[0].condition, plan), below_floor=below)
    # Of a tie the best quality is picked anyway: only another pick is another verdict.
    return held if held.pick == free.pick else replace(held, without_floor=free)


def _decide(group: Sequence[Figures], condition: Condition, plan: Plan) -> Decision:
    tied = list(group)
    for measure in Measure:
        if measure is Measure.GOODPUT and not has_levels(plan):
            continue
        ranked = _rank(tied, measure)
        best = ranked[:1]
        tied = best + [f for f in ranked[1:] if _ties(best[0], f, measure, plan.tie_margin)]
        if len(tied) == 1 and len(ranked) > 1:
            return Decision(condition, tied[0], measure, ranked[1], ())
    winner = tied[0] if len(tied) == 1 else None
    return Decision(condition, winner, None, None, () if winner else tuple(tied))


def reaches(quality: QualityFigures | None, floor: float | None) -> bool:
    """Whether a strategy's score reaches the floor. Without a floor all do; what was not measured reaches none."""
    if floor is None:
        return True
    return quality is not None and quality.score is not None and quality.score.value >= floor


def has_levels(plan: Plan) -> bool:
    """Whether the plan names any service level, so that goodput says more than throughput."""
    return any(v is not None for v in (plan.slo.ttft_ms, plan.slo.tpot_ms, plan.slo.e2e_ms))


def measured(figures: Figures, measure: Measure) -> Interval | None:
    """The figure that `measure` compares; latency in milliseconds."""
    if measure is Measure.GOODPUT:
        return figures.goodput
    if measure is Measure.THROUGHPUT:
        return figures.output_rate
    seconds = figures.e2e.get(50.0)
    return None if seconds is None else Interval(seconds.value * 1e3, seconds.low * 1e3, seconds.high * 1e3)


def _rank(group: Sequence[Figures], measure: Measure) -> list[Figures]:
    """Best first."""
    if measure is Measure.LATENCY:
        return sorted(group, key=lambda f: i.value if (i := measured(f, measure)) else math.inf)
    return sorted(group, key=lambda f: -(i.value if (i := measured(f, measure)) else 0.0))


def _ties(best: Figures, other: Figures, measure: Measure, margin: float) -> bool:
    """Whether the difference is too small or too noisy to call."""
    a, b = measured(best, measure), measured(other, measure)
    if a is None or b is None:
        return a is b
    # One repeat shows nothing of the machine's own noise: twice the margin stands in for it.
    doubt = margin if min(best.repeats, other.repeats) > 1 else 2 * margin
    return a.overlaps(b) or abs(a.value - b.value) <= doubt * max(a.value, b.value)


def score_of(figures: Figures) -> float:
    """The score of quality, 1 for what answers as the full cache does; 0 where it was not measured."""
    quality = figures.quality
    return 0.0 if quality is None or quality.score is None else quality.score.value


def crossovers(decisions: Sequence[Decision]) -> list[Crossover]:
    """Neighbouring conditions along each axis whose winners differ."""
    out = []
    for axis, (rest, value) in _AXES.items():
        lines: dict[Condition, list[Decision]] = defaultdict(list)
        for decision in decisions:
            if decision.pick is not None:
                lines[rest(decision.condition)].append(decision)
        for line in lines.values():
            ordered = sorted(line, key=value)
            out += [Crossover(axis, a, b) for a, b in pairwise(ordered) if _differ(a, b)]
    return out


def _differ(before: Decision, after: Decision) -> bool:
    """Whether another strategy is to be run: a clear winner of one side loses on the other.

    So is one that only ties there with a strategy of better quality: nothing pays for what it costs any more.
    """
    for one, other in ((before, after), (after, before)):
        if one.winner is None or other.pick is None:
            continue
        if other.winner is not None:
            return one.winner.who != other.winner.who
        in_tie = one.winner.who in {f.who for f in other.tied}
        return not in_tie or score_of(other.pick) > score_of(one.winner)
    return False


def _pool(decision: Decision) -> int:
    return 0 if decision.pick is None else decision.pick.pool_bytes


# Axis -> (a condition without its place on the axis, that place).
_AXES: dict[str, tuple[Callable[[Condition], Condition], Callable[[Decision], float]]] = {
    "rate": (lambda c: replace(c, rate=0.0), lambda d: d.condition.rate),
    "concurrency": (lambda c: replace(c, concurrency=0.0), lambda d: d.condition.concurrency),
    "context": (lambda c: replace(c, context=0), lambda d: d.condition.context),
    "memory": (lambda c: replace(c, memory=""), _pool),
    "ttl": (lambda c: replace(c, ttl_s=0.0), lambda d: d.condition.ttl_s),
}


def budget_crossovers(group: Sequence[Figures], plan: Plan) -> list[BudgetCrossover]:
    """Where, along the budgets of one framework, it stops to beat the best strategy of the other frameworks."""
    out = []
    for framework in dict.fromkeys(f.who.framework for f in group if f.who.budget is not None):
        own = sorted((f for f in group if f.who.framework == framework), key=lambda f: f.who.order)
        others = [f for f in group if f.who.framework != framework]
        if len(own) < 2 or not others:
            continue
        # Speed alone is compared here: the page shows what each budget costs in quality elsewhere.
        speed = plan.model_copy(update={"min_quality": None})
        other = decide(others, speed).pick or others[0]
        outcomes = [(f.who.budget or 1.0, decide([f, other], speed).winner is f) for f in own]
        for (budget, won), (next_budget, next_won) in pairwise(outcomes):
            if won != next_won:
                wins, fails = (budget, next_budget) if won else (next_budget, budget)
                out.append(BudgetCrossover(group[0].condition, framework, other, wins, fails))
    return out
