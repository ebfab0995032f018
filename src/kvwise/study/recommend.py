"""What to run: the strategy that does best over all conditions of a model, and the command that runs it."""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from kvwise.study.placement import tier_spec
from kvwise.study.plan import Plan
from kvwise.study.scores import QualityFigures
from kvwise.study.summary import Condition, Figures, Study
from kvwise.study.verdict import (
    BudgetCrossover,
    Crossover,
    Decision,
    Measure,
    budget_crossovers,
    crossovers,
    decide,
    has_levels,
    measured,
    reaches,
    score_of,
)
from kvwise.study.who import Who

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
    averaged over the `num_conditions` it was run under. `without_floor` would be recommended were there no quality
    floor, if that is another strategy.
    """

    model: str
    figures: Figures
    share: float
    num_conditions: int
    measure: Measure
    frugal: Frugal | None
    without_floor: Figures | None = None

    @property
    def command(self) -> str:
        """The command line to run it, with its tiers if it loads."""
        words = ["kvwise", "generate", "--model", self.model, "--strategy", self.figures.who.strategy]
        for tier in self.figures.condition.tiers.split(" + ") if self.figures.tier_shares else ():
            words += ["--tier", str(tier_spec(tier, Path("kv-cache")))]
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A strategy that the quality floor leaves out on one model. `quality` None: it was not measured."""

    model: str
    who: Who
    quality: QualityFigures | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who wins where, where that changes, what to run, and whom the quality floor leaves out."""

    decisions: tuple[Decision, ...]
    crossovers: tuple[Crossover, ...]
    budget_crossovers: tuple[BudgetCrossover, ...]
    recommendations: tuple[Recommendation, ...]
    rejections: tuple[Rejection, ...] = ()


def judge(study: Study) -> Verdict:
    """Judge a study by its plan's service levels, tie margin and quality floor."""
    groups: dict[Condition, list[Figures]] = defaultdict(list)
    for figures in study.figures:
        groups[figures.condition].append(figures)
    decisions = tuple(decide(group, study.plan) for _, group in groups.items())
    by_budget = tuple(c for _, group in groups.items() for c in budget_crossovers(group, study.plan))
    models = dict.fromkeys(f.condition.model for f in study.figures)
    advice = (_recommend(m, [f for f in study.figures if f.condition.model == m], study.plan) for m in models)
    return Verdict(
        decisions,
        tuple(crossovers(decisions)),
        by_budget,
        tuple(r for r in advice if r is not None),
        tuple(_rejections(study)),
    )


def _rejections(study: Study) -> Iterator[Rejection]:
    """Each strategy below the floor once per context length; where there was no traffic, of all that was measured."""
    found: dict[tuple[str, str, int | None], Rejection] = {}
    live = [(f.condition.model, f.who, f.quality) for f in study.figures]
    for model, who, quality in live or [(q.model, q.who, q) for q in study.qualities]:
        if not reaches(quality, study.plan.min_quality):
            key = (model, who.strategy, None if quality is None else quality.context)
            found.setdefault(key, Rejection(model, who, quality))
    yield from sorted(found.values(), key=lambda r: (r.model, 0 if r.quality is None else r.quality.context))


def _recommend(model: str, mine: Sequence[Figures], plan: Plan) -> Recommendation | None:
    """The recommendation, and what it would be without the quality floor. None: no strategy reaches the floor."""
    chosen = _best(model, mine, plan)
    if chosen is None or plan.min_quality is None:
        return chosen
    free = _best(model, mine, plan.model_copy(update={"min_quality": None}))
    if free is None or free.figures.who == chosen.figures.who:
        return chosen
    return replace(chosen, without_floor=free.figures)


def _best(model: str, mine: Sequence[Figures], plan: Plan) -> Recommendation | None:
    """The best average share; of those within the tie margin the one of the best quality. None: none allowed."""
    measure = Measure.GOODPUT if has_levels(plan) else Measure.THROUGHPUT
    shares = {s: share for s, share in _shares(mine, measure).items() if _allowed(s, mine, plan)}
    if not shares:
        return None
    near = [f for f in mine if shares.get(f.who.strategy, 0.0) >= max(shares.values()) * (1 - plan.tie_margin)]
    chosen = max(near, key=lambda f: (_worst(f.who.strategy, mine), shares[f.who.strategy]))
    count = len({f.condition for f in mine if f.who.strategy == chosen.who.strategy})
    return Recommendation(model, chosen, shares[chosen.who.strategy], count, measure, _frugal(mine, chosen, shares))


def _allowed(strategy: str, mine: Sequence[Figures], plan: Plan) -> bool:
    """Whether a strategy reaches the floor wherever its quality was measured: it is recommended for all conditions."""
    known = [f.quality for f in mine if f.who.strategy == strategy and f.quality is not None]
    return plan.min_quality is None or (bool(known) and all(reaches(quality, plan.min_quality) for quality in known))


def _worst(strategy: str, mine: Sequence[Figures]) -> float:
    """Its lowest score over the conditions where it was measured; 0 if nowhere."""
    return min((score_of(f) for f in mine if f.who.strategy == strategy and f.quality is not None), default=0.0)


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
