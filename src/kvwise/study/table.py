"""The study on the terminal: the verdict, then a table of all strategies; and the same as plain values for --json."""

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvwise.study import words
from kvwise.study.palette import Palette, short
from kvwise.study.recommend import Verdict
from kvwise.study.summary import Figures, Study
from kvwise.study.verdict import Decision


def print_study(console: Console, study: Study, verdict: Verdict) -> None:
    """Print the table of figures and, last, so that it is what stands above the prompt, the verdict."""
    colours = Palette(study).colours
    console.print(_figures(study, colours))
    console.print(_verdict(study, verdict, colours))


def _figures(study: Study, colours: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    for name, numeric in (("model", False), ("load", False), ("strategy", False), ("good/s", True), ("tok/s", True),
                          ("TTFT p50/p99 ms", True), ("TPOT ms", True), ("KV peak", True), ("hits", True),
                          ("agree", True)):  # fmt: skip
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name == "strategy")
    before = None
    for f in study.figures:
        if before is not None and f.condition != before:
            table.add_section()
        first = f.condition != before
        before = f.condition
        table.add_row(
            short(f.condition.model) if first else "",
            words.condition(f.condition) if first else "",
            Text(f.who.label, style=colours[f.who.framework]),
            words.number(f.goodput.value),
            words.number(f.output_rate.value),
            f"{_ms(f, 'ttft', 50.0)}/{_ms(f, 'ttft', 99.0)}",
            _ms(f, "tpot", 50.0),
            words.tiers(f.peak_kv),
            words.share(f.hit_ratio),
            words.share(f.agreement.value) if f.agreement else "–",
        )
    return table


def _ms(figures: Figures, name: str, q: float) -> str:
    interval = getattr(figures, name).get(q)
    return "–" if interval is None else words.number(interval.value * 1e3)


def _verdict(study: Study, verdict: Verdict, colours: dict[str, str]) -> RenderableType:
    lines: list[Text] = [Text("\nVerdict", style="bold")]
    for decision in verdict.decisions:
        lines.append(_decision(decision, colours))
    changes = [words.crossover(c) for c in verdict.crossovers]
    changes += [words.budget_crossover(c) for c in verdict.budget_crossovers]
    if changes:
        lines += [Text("\nWhere the winner changes", style="bold"), *(Text(f"  {text}") for text in changes)]
    for row in study.failed:
        lines.append(Text(f"failed: {short(row['model'])}, {row['strategy']}: {row['reason']}", style="red"))
    for name, text in sorted(study.links.items()):
        lines.append(Text(f"link {name}: {text}"))
    for advice in verdict.recommendations:
        lines.append(Text(f"\n{short(advice.model)}: {advice.figures.who.label} {words.advice(advice)}", style="bold"))
        if advice.frugal:
            lines.append(Text(f"  {words.frugal(advice.frugal)}"))
        lines.append(Text(f"  run: {advice.command}"))
    return Group(*lines)


def _decision(decision: Decision, colours: dict[str, str]) -> Text:
    line = Text(f"  {short(decision.condition.model)}, {words.condition(decision.condition)}: ")
    colour = "" if decision.winner is None else colours[decision.winner.who.framework]
    name, _, rest = words.outcome(decision).partition(": ")
    line.append(name, style=colour)
    return line.append(f": {rest}" if rest else "")


def as_values(study: Study, verdict: Verdict) -> dict[str, Any]:
    """The same as JSON values; times in seconds, sizes in bytes, each figure with its interval."""
    return {
        "study": study.name,
        "recommendations": [
            {"model": r.model, "strategy": r.figures.who.strategy, "share_of_best": r.share, "command": r.command}
            for r in verdict.recommendations
        ],
        "decisions": [
            {
                "condition": _plain(asdict(d.condition)),
                "winner": None if d.winner is None else d.winner.who.strategy,
                "by": None if d.by is None else d.by.value,
                "tied": [f.who.strategy for f in d.tied],
                "text": words.outcome(d),
            }
            for d in verdict.decisions
        ],
        "crossovers": [words.crossover(c) for c in verdict.crossovers]
        + [words.budget_crossover(c) for c in verdict.budget_crossovers],
        "figures": [_plain(asdict(f)) for f in study.figures],
        "failed": [{"cell": r["cell"], "strategy": r["strategy"], "reason": r["reason"]} for r in study.failed],
        "cells_left": study.num_left,
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unlimited rate or concurrency becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
