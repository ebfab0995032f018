"""The study on the terminal: the verdict, then a table of all strategies; and the same as plain values for --json."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvwise.study import pareto_page as pareto
from kvwise.study import words
from kvwise.study.loading_page import loading_tables, loading_values
from kvwise.study.palette import Palette, short
from kvwise.study.quality_words import findings
from kvwise.study.recommend import Rejection, Verdict
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.summary import Figures, Study
from kvwise.study.verdict import Decision


def print_study(console: Console, study: Study, verdict: Verdict) -> None:
    """Print the tables of figures and answers and, last, so that it is what stands above the prompt, the verdict."""
    colours = Palette(study).colours
    if study.figures:
        console.print(_figures(study, colours))
    for model, context in dict.fromkeys((q.model, q.context) for q in study.qualities):
        here = [q for q in study.qualities if (q.model, q.context) == (model, context)]
        for protocol in dict.fromkeys(t.protocol for q in here for t in q.tasks):
            console.print(_answers(here, protocol, colours))
    front = list(pareto.sentences(study.qualities))
    for heading, sentences in [*([(pareto.HEADING, front)] if front else []), *findings(study.qualities)]:
        lines = (Text(f"  {sentence}") for sentence in sentences)
        console.print(Group(Text(f"\n{heading}", style="bold"), *lines))
    if study.loading:
        console.print(loading_tables(study))
    console.print(_verdict(study, verdict, colours))


def _answers(here: Sequence[QualityFigures], protocol: str, colours: dict[str, str]) -> RenderableType:
    """What the strategies cost in answers on one model and context length, asked by one protocol."""
    first = here[0]
    tasks = list(dict.fromkeys(t.task for q in here for t in q.tasks if t.protocol == protocol))
    graded = first.basis == Basis.TASKS
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for name in ("score", *tasks) if graded else ("same top-1", "KL nats"):
        table.add_column(name, justify="right")
    table.add_column("KV per token", justify="right")
    for q in here:
        found = {t.task: t for t in q.tasks if t.protocol == protocol}
        marks = [found[task].accuracy or found[task].nll if task in found else None for task in tasks]
        figures = [q.score, *marks] if graded else [q.top1, q.kl]
        shown = Text(q.who.label, style=colours[q.who.framework])
        tight = (words.estimate(figure).replace(" ", "") for figure in figures)
        table.add_row(shown, *tight, words.tiers(q.kv_bytes_per_token))
    heading = f"Quality, {protocol}" if graded else "Agreement with the full cache: a distance, and no quality"
    return Group(Text(f"\n{heading}: {short(first.model)}, context {first.context}", style="bold"), table)


def _figures(study: Study, colours: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    for name, numeric in (("model", False), ("load", False), ("strategy", False), ("good/s", True), ("tok/s", True),
                          ("TTFT p50/p99 ms", True), ("TPOT ms", True), ("KV peak", True), ("hits", True),
                          ("quality", True)):  # fmt: skip
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
            words.score(f.quality),
        )
    return table


def _ms(figures: Figures, name: str, q: float) -> str:
    interval = getattr(figures, name).get(q)
    return "–" if interval is None else words.number(interval.value * 1e3)


def _verdict(study: Study, verdict: Verdict, colours: dict[str, str]) -> RenderableType:
    lines: list[Text] = [Text("\nVerdict", style="bold")] if verdict.decisions else []
    for decision in verdict.decisions:
        lines.append(_decision(decision, colours))
        if decision.without_floor is not None:
            lines.append(Text(f"    {words.without_floor(decision)}", style="dim"))
    floor = study.plan.min_quality
    if floor is not None and (study.figures or study.qualities):
        lines.append(Text(f"\nLeft out by the quality floor of {words.number(floor)}", style="bold"))
        for ground, told in words.rejections(verdict.rejections, floor):
            lines += [Text(f"  {ground}", style="dim"), *(Text(f"  {text}") for text in told)]
        if not verdict.rejections:
            lines.append(Text("  nobody: every strategy reaches it"))
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
        if advice.without_floor:
            lines.append(Text(f"  without the quality floor: {advice.without_floor.who.label}"))
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
            {
                "model": r.model,
                "strategy": r.figures.who.strategy,
                "share_of_best": r.share,
                "command": r.command,
                "without_floor": None if r.without_floor is None else r.without_floor.who.strategy,
            }
            for r in verdict.recommendations
        ],
        "min_quality": study.plan.min_quality,
        "rejected": [_rejected(r, study.plan.min_quality) for r in verdict.rejections],
        "decisions": [
            {
                "condition": _plain(asdict(d.condition)),
                "winner": None if d.winner is None else d.winner.who.strategy,
                "by": None if d.by is None else d.by.value,
                "tied": [f.who.strategy for f in d.tied],
                "below_floor": [f.who.strategy for f in d.below_floor],
                "without_floor": None if d.without_floor is None else words.outcome(d.without_floor),
                "text": words.outcome(d),
            }
            for d in verdict.decisions
        ],
        "crossovers": [words.crossover(c) for c in verdict.crossovers]
        + [words.budget_crossover(c) for c in verdict.budget_crossovers],
        "figures": [_plain(asdict(f)) for f in study.figures],
        "quality": [_plain(asdict(q)) for q in study.qualities],
        "findings": dict(findings(study.qualities)),
        "pareto": pareto.pareto_values(study.qualities),
        "failed": [{"cell": r["cell"], "strategy": r["strategy"], "reason": r["reason"]} for r in study.failed],
        **loading_values(study, study.plan),
        "cells_left": study.num_left,
    }


def _rejected(given: Rejection, floor: float | None) -> dict[str, Any]:
    score = None if given.quality is None else given.quality.score
    return {
        "model": given.model,
        "strategy": given.who.strategy,
        "context": None if given.quality is None else given.quality.context,
        "basis": None if given.quality is None else str(given.quality.basis),
        "score": None if score is None else score.value,
        "error": None if score is None else score.error,
        "text": words.shortfall(given, floor or 0.0),
        "grounds": None if given.quality is None else words.basis(given.quality),
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unlimited rate or concurrency becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
