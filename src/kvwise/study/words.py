"""Figures and findings in words, the same on the page and on the terminal."""

import math
from collections.abc import Sequence

from kvwise.study.bootstrap import Interval
from kvwise.study.cells import REFERENCE
from kvwise.study.estimate import Estimate, Z
from kvwise.study.palette import short
from kvwise.study.recommend import Frugal, Recommendation, Rejection
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.summary import Condition, Figures
from kvwise.study.verdict import BudgetCrossover, Crossover, Decision, Measure, measured

UNITS = {Measure.GOODPUT: "good req/s", Measure.THROUGHPUT: "output tok/s", Measure.LATENCY: "ms end to end (median)"}
AXIS_WORDS = {
    "rate": "the request rate",
    "concurrency": "concurrency",
    "context": "context length",
    "memory": "KV memory",
    "ttl": "the time to live",
}
ARTICLE = "the article's number: 9.28 s → 3.19 s (2.91×), not reproduced: its setting is unknown"


def number(value: float) -> str:
    """Three significant digits, thousands separated, no exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "–"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def spread(interval: Interval | None, scale: float = 1.0) -> str:
    """A value with its interval."""
    if interval is None:
        return "–"
    low, high = (number(v * scale) for v in (interval.low, interval.high))
    return f"{number(interval.value * scale)} ({low}–{high})"


def estimate(found: Estimate | None) -> str:
    """A value with one standard error: two decimals, three where the error is small; alone where there is none."""
    if found is None:
        return "–"
    if found.error < 0.0005:
        return number(found.value)
    digits = 2 if found.error >= 0.00995 else 3
    return f"{found.value:.{digits}f} ± {found.error:.{digits}f}"


def basis_word(quality: QualityFigures | None) -> str:
    """What its score is called."""
    return "agreement" if quality is not None and quality.basis == Basis.AGREEMENT else "score"


def score(quality: QualityFigures | None) -> str:
    """The score with its standard error; agreement is named, since it is another thing."""
    if quality is None or quality.score is None:
        return "–"
    return ("agrees " if quality.basis == Basis.AGREEMENT else "") + estimate(quality.score)


def basis(quality: QualityFigures) -> str:
    """What a score rests on."""
    where = f"context {quality.context}"
    if quality.basis == Basis.AGREEMENT:
        return f"most likely tokens that are the full cache's, random prompts, {where}"
    tasks = {t.task for t in quality.tasks if t.accuracy is not None} - set(quality.left_out)
    answers = sum(t.num_answers for t in quality.tasks if t.task in tasks)
    count = f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"
    return f"right answers over the full cache's, {count}, {answers:,} answers, {where}"


def _answers(quality: QualityFigures) -> str:
    if quality.basis == Basis.AGREEMENT and quality.who.strategy != REFERENCE:
        return f"agrees with the full cache on {estimate(quality.score)} of tokens"
    if quality.who.strategy == REFERENCE:
        return "its answers are what quality is measured by"
    return f"gives {estimate(quality.score)} of the full cache's right answers (context {quality.context})"


def shortfall(given: Rejection, floor: float) -> str:
    """By what a strategy misses the quality floor."""
    quality = given.quality
    if quality is None:
        return f"{given.who.label}: its quality was not measured"
    if quality.score is None:
        return f"{given.who.label}: no task of context {quality.context} has right answers that the full cache knows"
    close = floor - quality.score.value <= Z * quality.score.error
    doubt = ", within the error of the floor" if close else ""
    return f"{given.who.label}: {basis_word(quality)} {estimate(quality.score)}{doubt}"


def rejections(given: Sequence[Rejection], floor: float) -> list[tuple[str, list[str]]]:
    """(On what grounds, whom) the quality floor leaves out, by model and context."""
    out: dict[str, list[str]] = {}
    for rejection in given:
        quality = rejection.quality
        ground = "" if quality is None or quality.score is None else f": {basis(quality)}"
        out.setdefault(short(rejection.model) + ground, []).append(shortfall(rejection, floor))
    return list(out.items())


def without_floor(decision: Decision) -> str:
    """Who would have won without the quality floor; empty if the same."""
    return "" if decision.without_floor is None else f"without the floor: {outcome(decision.without_floor)}"


def size(num_bytes: float) -> str:
    """Bytes with a unit."""
    for unit, amount in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= amount:
            return f"{number(num_bytes / amount)} {unit}"
    return f"{num_bytes:.0f} B"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{value * 100:.0f} %"


def budget(value: float | None) -> str:
    """A KV budget as per cent, without rounding."""
    return "–" if value is None else f"{value * 100:g} %"


def condition(given: Condition) -> str:
    """A condition in one phrase, without its model."""
    context = f", context {given.context}" if given.context else ""
    memory = "" if given.memory == "auto" else f", KV memory {given.memory}"
    return f"{given.load_text()}{context}{memory}{given.placed}"


def outcome(decision: Decision) -> str:
    """The verdict of one condition in one sentence."""
    winner = decision.winner
    if winner is None:
        if not decision.tied:
            return "no strategy reaches the quality floor"
        return f"tie: {', '.join(f.who.label for f in decision.tied)}"
    if decision.by is None or decision.runner_up is None:
        return f"{winner.who.label} (nothing to compare with)"
    best, second = measured(winner, decision.by), measured(decision.runner_up, decision.by)
    return (
        f"{winner.who.label}: {spread(best)} {UNITS[decision.by]}, next {decision.runner_up.who.label} {spread(second)}"
    )


def factor(decision: Decision) -> str:
    """By how much the winner beats the next."""
    if decision.winner is None or decision.runner_up is None or decision.by is None:
        return ""
    best, second = measured(decision.winner, decision.by), measured(decision.runner_up, decision.by)
    if best is None or second is None or min(best.value, second.value) <= 0:
        return ""
    ratio = second.value / best.value if decision.by is Measure.LATENCY else best.value / second.value
    return f"{ratio:.2f}×"


def crossover(found: Crossover) -> str:
    """Where the winner changes, in one sentence."""
    sides = []
    for decision in (found.before, found.after):
        tied = ", ".join(f.who.label for f in decision.tied)
        name = f"a tie of {tied}" if decision.winner is None else decision.winner.who.label
        sides.append(f"{name} at {_place(found.axis, decision.condition)}")
    given = found.before.condition
    return f"{given.model}, block {given.block}, along {AXIS_WORDS[found.axis]}: {sides[0]}, then {sides[1]}"


def _place(axis: str, given: Condition) -> str:
    if axis == "memory":
        return given.memory
    if axis == "ttl":
        return "no TTL" if math.isinf(given.ttl_s) else f"a TTL of {given.ttl_s:g} s"
    return f"{given.context} tokens" if axis == "context" else given.load_text()


def budget_crossover(found: BudgetCrossover) -> str:
    """Up to which budget a framework beats the others, in one sentence."""
    given = found.condition
    return (
        f"{given.model}, {condition(given)}: {found.framework} beats {found.other.who.label} in speed at budget "
        f"{budget(found.wins)}, not at {budget(found.fails)}"
    )


def advice(given: Recommendation) -> str:
    """Why this is recommended."""
    what = "goodput" if given.measure is Measure.GOODPUT else "throughput"
    quality = given.figures.quality
    told = "" if quality is None or quality.score is None else f"; {_answers(quality)}"
    count = f"{given.num_conditions} condition{'s' if given.num_conditions > 1 else ''}"
    return f"reaches {share(given.share)} of the best {what} over {count}{told}"


def frugal(given: Frugal) -> str:
    """The alternative for short memory."""
    quality = given.figures.quality
    scored = quality is not None and quality.score is not None
    told = f" and {basis_word(quality)} {estimate(quality.score)}" if quality is not None and scored else ""
    return (
        f"where KV memory is short: {given.figures.who.label} gives {given.gain:.1f}× the output per byte of KV held, "
        f"at {share(given.share)} of the best speed{told}"
    )


def tiers(values: dict[str, float]) -> str:
    """Bytes per tier, the device's first and without its name."""
    named = [size(v) + ("" if tier == "device" else f" {tier}") for tier, v in sorted(values.items()) if v]
    return " + ".join(named) or "–"


def milliseconds(figures: Figures, name: str, q: float) -> str:
    """A latency percentile with its interval, in ms."""
    return spread(getattr(figures, name).get(q), 1000)
