"""Two studies side by side: the strategies and conditions both measured, and how the figures moved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kvwise.study import words
from kvwise.study.bootstrap import Interval
from kvwise.study.estimate import Estimate
from kvwise.study.findings import differ
from kvwise.study.palette import short
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.summary import Figures, Study

FIGURES: tuple[tuple[str, Callable[[Figures], Interval | None], float, bool], ...] = (
    ("good req/s", lambda f: f.goodput, 1.0, True),
    ("output tok/s", lambda f: f.output_rate, 1.0, True),
    ("TTFT p50 ms", lambda f: f.ttft.get(50.0), 1e3, False),
    ("TPOT p50 ms", lambda f: f.tpot.get(50.0), 1e3, False),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one strategy under one condition in two studies. `better` is None where they tie."""

    model: str
    where: str  # the condition in words
    strategy: str
    label: str
    figure: str
    before: Interval
    after: Interval
    better: bool | None


def compare(before: Study, after: Study) -> list[Change]:
    """Every figure that both studies have; a change counts only where it is larger than the noise."""
    known = {(f.condition, f.who.strategy): f for f in before.figures}
    out = []
    for now in after.figures:
        then = known.get((now.condition, now.who.strategy))
        for name, value, scale, more_is_better in FIGURES if then is not None else ():
            a, b = (value(f) for f in (then, now) if f is not None)
            if a is not None and b is not None:
                old, new = (Interval(i.value * scale, i.low * scale, i.high * scale) for i in (a, b))
                better = None if old.overlaps(new) else (new.value > old.value) is more_is_better
                where = words.condition(now.condition)
                out.append(Change(now.condition.model, where, now.who.strategy, now.who.label, name, old, new, better))
    return out + _quality_changes(before, after)


def _quality_changes(before: Study, after: Study) -> list[Change]:
    """Scores and tasks that both have; intervals are 95 % from standard errors here."""
    known = {(q.model, q.context, q.who.strategy): q for q in before.qualities}
    out = []
    for now in after.qualities:
        then = known.get((now.model, now.context, now.who.strategy))
        if then is None or then.basis != now.basis:
            continue
        for name, more_is_better, a, b in _pairs(then, now):
            if a is not None and b is not None:
                better = (b.value > a.value) is more_is_better if differ(a, b) else None
                old, new = (Interval(e.value, e.low, e.high) for e in (a, b))
                where = f"quality, context {now.context}"
                out.append(Change(now.model, where, now.who.strategy, now.who.label, name, old, new, better))
    return out


def _pairs(then: QualityFigures, now: QualityFigures) -> Iterator[tuple[str, bool, Estimate | None, Estimate | None]]:
    """(Name, whether more is better, before, after) of the score and of every task that both have."""
    yield words.basis_word(now), True, then.score, now.score
    found = {(t.task, t.protocol): t for t in then.tasks if now.basis == Basis.TASKS}
    for t in now.tasks:
        old = found.get((t.task, t.protocol))
        if old is None:
            continue
        if t.accuracy is not None:
            yield f"{t.task}, {t.protocol}", True, old.accuracy, t.accuracy
        else:
            yield f"{t.task}, {t.protocol}, nats", False, old.nll, t.nll


def change_table(changes: list[Change], names: tuple[str, str]) -> Table:
    """The changes as a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("model", "condition", "strategy", "figure", *names, "change"):
        table.add_column(name, justify="right" if name in (*names, "change") else "left", overflow="fold")
    for c in changes:
        colour = "" if c.better is None else "green" if c.better else "red"
        verdict = "tie" if c.better is None else _percent(c)
        row = (short(c.model), c.where, c.label, c.figure)
        table.add_row(
            *row, words.spread(c.before), words.spread(c.after), f"[{colour}]{verdict}[/]" if colour else verdict
        )
    return table


def _percent(change: Change) -> str:
    if change.before.value == 0:
        return f"from 0 to {words.number(change.after.value)}"
    return f"{(change.after.value / change.before.value - 1) * 100:+.0f} %"


def change_values(changes: list[Change]) -> list[dict[str, Any]]:
    """The changes as JSON values."""
    return [
        {
            "model": c.model,
            "condition": c.where,
            "strategy": c.strategy,
            "figure": c.figure,
            "before": [c.before.value, c.before.low, c.before.high],
            "after": [c.after.value, c.after.low, c.after.high],
            "better": c.better,
        }
        for c in changes
    ]
