"""What charts of quality have in common: their sections, words and error bars."""

from collections.abc import Sequence
from typing import TypedDict

from kvwise.study.chart import Rule
from kvwise.study.estimate import Estimate
from kvwise.study.scores import Basis
from kvwise.study.summary import Study
from kvwise.study.words import number

QUALITY, AGREEMENT = "Quality", "Agreement with the full cache"
BARS = "bars: 95 %, ±1.96 standard errors by episode"
GUIDES = "dashed grey: guides, which choose blindly"
FORCED = "the full cache's greedy answers forced on each strategy"
LABELS = {str(Basis.TASKS): "score, full cache = 1", str(Basis.AGREEMENT): "same most likely token, share"}


class Bars(TypedDict):
    """Ends of error bars."""

    low: tuple[float, ...] | None
    high: tuple[float, ...] | None


def section_of(basis: str) -> str:
    """The section in which figures of a basis are shown: agreement is no quality and does not pass for it."""
    return QUALITY if basis == Basis.TASKS else AGREEMENT


def floor_rule(study: Study) -> tuple[Rule, ...]:
    """The quality floor, if the plan has one."""
    floor = study.plan.min_quality
    return () if floor is None else (Rule(floor, f"quality floor, {number(floor)}", at_end=True),)


def top(basis: str) -> float | None:
    """The y axis' end, where there is one by nature: a score may be above the full cache's."""
    return 1.04 if basis == Basis.AGREEMENT else None


def bars(found: Sequence[Estimate], bounded: bool) -> Bars:
    """Ends of error bars, inside what is possible; none where nothing has an error."""
    if not any(e.error for e in found):
        return {"low": None, "high": None}
    return {
        "low": tuple(max(e.low, 0.0) for e in found),
        "high": tuple(min(e.high, 1.0) if bounded else e.high for e in found),
    }
