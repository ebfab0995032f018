"""Two studies side by side: the strategies and conditions both measured, and how the figures moved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kvwise.study import words
from kvwise.study.bootstrap import Interval
from kvwise.study.palette import short
from kvwise.study.summary import Condition, Figures, Study

FIGURES: tuple[tuple[str, Callable[[Figures], Interval | None], float, bool], ...] = (
    ("good req/s", lambda f: f.goodput, 1.0, True),
    ("output tok/s", lambda f: f.output_rate, 1.0, True),
    ("TTFT p50 ms", lambda f: f.ttft.get(50.0), 1e3, False),
    ("TPOT p50 ms", lambda f: f.tpot.get(50.0), 1e3, False),
    ("agreement %", lambda f: f.agreement, 1e2, True),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one strategy under one condition in two studies. `better` is None where they tie."""

    condition: Condition
    strategy: str
    label: str
    figure: str
    before: Interval
    after: Interval
    better: bool | None


def compare(before: Study, after: Study) -> list[Change]:
    """Every figure that both studies have; a change counts only where the intervals do not overlap."""
    known = {(f.condition, f.who.strategy): f for f in before.figures}
    out = []
    for now in after.figures:
        then = known.get((now.condition, now.who.strategy))
        for name, value, scale, more_is_better in FIGURES if then is not None else ():
            a, b = (value(f) for f in (then, now) if f is not None)
            if a is not None and b is not None:
                old, new = (Interval(i.value * scale, i.low * scale, i.high * scale) for i in (a, b))
                better = None if old.overlaps(new) else (new.value > old.value) is more_is_better
                out.append(Change(now.condition, now.who.strategy, now.who.label, name, old, new, better))
    return out


def change_table(changes: list[Change], names: tuple[str, str]) -> Table:
    """The changes as a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("model", "condition", "strategy", "figure", *names, "change"):
        table.add_column(name, justify="right" if name in (*names, "change") else "left", overflow="fold")
    for c in changes:
        colour = "" if c.better is None else "green" if c.better else "red"
        verdict = "tie" if c.better is None else _percent(c)
        row = (short(c.condition.model), words.condition(c.condition), c.label, c.figure)
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
            "model": c.condition.model,
            "condition": words.condition(c.condition),
            "strategy": c.strategy,
            "figure": c.figure,
            "before": [c.before.value, c.before.low, c.before.high],
            "after": [c.after.value, c.after.low, c.after.high],
            "better": c.better,
        }
        for c in changes
    ]
