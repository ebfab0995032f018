"""What to run: the strategy that does best over all conditions of a model, and the command that runs it."""

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvwise.study.plan import Plan
from kvwise.study.summary import Condition, Figures, Study
from kvwise.study.verdict import (
    BudgetCrossover,
    Crossover,
    Decision,
    Measure,
    agreement_of,
    budget_crossovers,
    crossovers,
    decide,
    has_levels,
    measured,
)

FRUGAL_SHARE = 0.5  # the strategy with most output per byte is named only if it reaches half of the best


@dataclass(frozen=True, slots=True)
class Frugal:
    """The strategy that gives most output per byte of KV held, and how many times more than the recommended one."""

    figures: Figures
    gain: float
    share: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to run for one model.

    `share` is its goodput (throughput, if the plan has no service levels) relative to the best of each condition,
    averaged over the `num_conditions` it was run under.
    """

    model: str
    figures: Figures
    share: float
    num_conditions: int
    measure: Measure
    frugal: Frugal | None

    @property
    def command(self) -> str:
        """The command line to run it."""
        return f"kvwise generate --model {shlex.quote(self.model)} --strategy {shlex.quote(self.figures.who.strategy)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who wins where, where that changes, and what to run."""

    decisions: tuple[Decision, ...]
    crossovers: tuple[Crossover, ...]
    budget_crossovers: tuple[BudgetCrossover, ...]
    recommendations: tuple[Recommendation, ...]


def judge(study: Study) -> Verdict:
    """Judge a study by its plan's service levels, tie margin and agreement floor."""
    groups: dict[Condition, list[Figures]] = defaultdict(list)
    for figures in study.figures:
        groups[figures.condition].append(figures)
    decisions = tuple(decide(group, study.plan) for _, group in groups.items())
    by_budget = tuple(c for _, group in groups.items() for c in budget_crossovers(group, study.plan))
    models = dict.fromkeys(f.condition.model for f in study.figures)
    advice = (_recommend(m, [f for f in study.figures if f.condition.model == m], study.plan) for m in models)
    return Verdict(decisions, tuple(crossovers(decisions)), by_budget, tuple(r for r in advice if r is not None))


def _recommend(model: str, mine: Sequence[Figures], plan: Plan) -> Recommendation | None:
    """The best average share; of those within the tie margin the one nearest to the full cache. None: none allowed."""
    measure = Measure.GOODPUT if has_levels(plan) else Measure.THROUGHPUT
    shares = {s: share for s, share in _shares(mine, measure).items() if _allowed(s, mine, plan)}
    if not shares:
        return None
    near = [f for f in mine if shares.get(f.who.strategy, 0.0) >= max(shares.values()) * (1 - plan.tie_margin)]
    chosen = max(near, key=lambda f: (agreement_of(f), shares[f.who.strategy]))
    count = len({f.condition for f in mine if f.who.strategy == chosen.who.strategy})
    return Recommendation(model, chosen, shares[chosen.who.strategy], count, measure, _frugal(mine, chosen, shares))


def _allowed(strategy: str, mine: Sequence[Figures], plan: Plan) -> bool:
    best = max(agreement_of(f) for f in mine if f.who.strategy == strategy)
    return plan.agreement_floor is None or best >= plan.agreement_floor


def _shares(mine: Sequence[Figures], measure: Measure) -> dict[str, float]:
    """Per strategy its share of the best figure, averaged over the conditions of the blocks it stands in.

    A condition in which nobody had any goodput says nothing; one in which its own cells failed counts as 0.
    """
    best: dict[Condition, float] = defaultdict(float)
    for f in mine:
        best[f.condition] = max(best[f.condition], _value(f, measure))
    out = {}
    for strategy in dict.fromkeys(f.who.strategy for f in mine):
        found = {f.condition: f for f in mine if f.who.strategy == strategy}
        blocks = {c.block for c in found}
        planned = [c for c in best if c.block in blocks and best[c] > 0]
        if planned:
            out[strategy] = fmean(_value(found[c], measure) / best[c] if c in found else 0.0 for c in planned)
    return out


def _frugal(mine: Sequence[Figures], chosen: Figures, shares: dict[str, float]) -> Frugal | None:
    density: dict[str, list[float]] = defaultdict(list)
    for f in mine:
        if f.rate_per_mib is not None and shares.get(f.who.strategy, 0.0) >= FRUGAL_SHARE * max(shares.values()):
            density[f.who.strategy].append(f.rate_per_mib)
    means = {strategy: fmean(values) for strategy, values in density.items()}
    if chosen.who.strategy not in means:
        return None
    best = max(means, key=lambda s: means[s])
    if best == chosen.who.strategy:
        return None
    figures = next(f for f in mine if f.who.strategy == best)
    return Frugal(figures, means[best] / means[chosen.who.strategy], shares[best])


def _value(figures: Figures, measure: Measure) -> float:
    interval = measured(figures, measure)
    return 0.0 if interval is None else interval.value
