"""Charts of quality against the budget: the score, and every task."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kvwise.study.bytes_charts import bytes_charts
from kvwise.study.chart import Chart, Rule, Series
from kvwise.study.estimate import Estimate
from kvwise.study.groups import groups
from kvwise.study.names import labels, shared_note
from kvwise.study.palette import Palette, is_guide, short, slug
from kvwise.study.quality_looks import BARS, FORCED, GUIDES, LABELS, bars, floor_rule, section_of
from kvwise.study.scores import Basis, QualityFigures, TaskFigures
from kvwise.study.summary import Study
from kvwise.study.words import budget as budget_text

DODGE = 0.018  # points of one budget stand beside each other, in steps of the axis

Pick = Callable[[QualityFigures], Estimate | None]


def quality_charts(study: Study, palette: Palette) -> list[Chart]:
    """Charts of what was answered, per model and context length: against the budget, and against KV bytes.

    Strategies that are too many for one chart are drawn block by block.
    """
    kinds: dict[tuple[str, str, int], list[QualityFigures]] = {}
    for q in study.qualities:
        kinds.setdefault((q.basis, q.model, q.context), []).append(q)
    return [chart for everyone in kinds.values() for chart in _charts(study, palette, everyone)]


def _charts(study: Study, palette: Palette, everyone: Sequence[QualityFigures]) -> Iterator[Chart]:
    """Of one model and context length."""
    parts = groups(study.plan, [q.who for q in everyone])
    rules = floor_rule(study)
    if len(parts) == 1:
        yield from _group_charts(palette, everyone, rules, bytes_charts(palette, everyone, everyone, rules))
        return
    yield from bytes_charts(palette, everyone, everyone, rules, parts)
    for name, members in parts.items():
        here = [q for q in everyone if q.who in members]
        for chart in _group_charts(palette, here, rules, bytes_charts(palette, here, everyone, rules)):
            folded = "score" not in chart.title and "top-1" not in chart.title
            yield replace(chart, id=slug(chart.id, name), group=name, folded=folded)


def _group_charts(
    palette: Palette, here: Sequence[QualityFigures], rules: tuple[Rule, ...], against_bytes: Iterator[Chart]
) -> Iterator[Chart]:
    first = here[0]
    if first.basis == Basis.TASKS:
        yield from _against_budget(here, palette, "score", lambda q: q.score, LABELS[first.basis], rules)
        yield from against_bytes
        for key in dict.fromkeys((t.task, t.protocol) for q in here for t in q.tasks):
            yield from _task_chart(here, palette, *key)
        return
    yield from _against_budget(here, palette, "top-1", lambda q: q.top1, LABELS[first.basis], rules)
    yield from _against_budget(here, palette, "KL", lambda q: q.kl, "KL(full ‖ method), nats", ())
    yield from against_bytes


# -- against the budget -----------------------------------------------------------------------------------------------


def _task_chart(here: Sequence[QualityFigures], palette: Palette, task: str, protocol: str) -> Iterator[Chart]:
    """Right answers of one task under one protocol, or nats per token where nothing is right or wrong."""
    graded = any(t.accuracy is not None for q in here for t in _find(q, task, protocol))

    def pick(q: QualityFigures) -> Estimate | None:
        found = _find(q, task, protocol)
        return (found[0].accuracy if graded else found[0].nll) if found else None

    label = "right answers, share" if graded else "nats per token (less is better)"
    yield from _against_budget(here, palette, f"{task}, {protocol}", pick, label, ())


def _find(q: QualityFigures, task: str, protocol: str) -> list[TaskFigures]:
    return [t for t in q.tasks if (t.task, t.protocol) == (task, protocol)]


def _against_budget(
    here: Sequence[QualityFigures], palette: Palette, name: str, pick: Pick, y_label: str, rules: tuple[Rule, ...]
) -> Iterator[Chart]:
    """A line per framework over the budgets, from large to small: where methods differ, their names stand beside."""
    budgets = sorted({q.who.budget for q in here if q.who.budget is not None}, reverse=True)
    if len(budgets) < 2:
        return
    first = here[0]
    bounded = "share" in y_label
    guides = any(is_guide(q.who.framework) for q in here)
    shown = shared_note([q.who.framework for q in here])
    notes = (BARS, GUIDES if guides else "", "" if first.basis == Basis.TASKS else FORCED, shown)
    yield Chart(
        id=slug("quality" if first.basis == Basis.TASKS else "agreement", name, first.model, first.context),
        section=section_of(first.basis),
        title=f"{name}, {short(first.model)}, context {first.context}",
        note="; ".join(filter(None, notes)),
        x_label="KV budget",
        y_label=y_label,
        series=(*_levels(here, palette, budgets, pick), *_lines(here, palette, budgets, pick, bounded)),
        zero="nats per token" not in y_label,  # it starts far above 0, and what differs is small
        top=1.04 if bounded else None,
        ticks=tuple((float(i), budget_text(b)) for i, b in enumerate(budgets)),
        rules=rules,
    )


def _lines(
    here: Sequence[QualityFigures], palette: Palette, budgets: Sequence[float], pick: Pick, bounded: bool
) -> Iterator[Series]:
    frameworks = _guides_first({q.who.framework: None for q in here if q.who.budget is not None})
    names = labels([q.who.framework for q in here])
    for place, framework in enumerate(frameworks):
        offset = DODGE * (place - (len(frameworks) - 1) / 2)
        own = [(q.who.budget, e) for q in here if q.who.framework == framework and (e := pick(q)) is not None]
        points = sorted((budgets.index(b) + offset, b, e) for b, e in own if b is not None)
        if points:
            yield Series(
                names[framework],
                palette.colours[framework],
                tuple(x for x, _, _ in points),
                tuple(e.value for _, _, e in points),
                **bars([e for _, _, e in points], bounded),
                names=tuple(f"{budget_text(b)} ({e.count:,} answers)" for _, b, e in points),
                guide=is_guide(framework),
            )


def _levels(here: Sequence[QualityFigures], palette: Palette, budgets: Sequence[float], pick: Pick) -> Iterator[Series]:
    """A strategy without a budget is a level across all of them; levels at one height share a line."""
    by_height: dict[float, list[str]] = {}
    for q in here:
        found = pick(q)
        if q.who.budget is None and found is not None:
            by_height.setdefault(round(found.value, 6), []).append(q.who.framework)
    ends = (-0.15, len(budgets) - 1 + 0.08)
    short_names = labels([q.who.framework for q in here])
    for height, names in by_height.items():
        label = short_names[names[0]] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        yield Series(
            label, palette.colours[names[0]], ends, (height, height), markers=False, names=(", ".join(names),) * 2
        )


def _guides_first(frameworks: Sequence[str] | dict[str, None]) -> list[str]:
    """Guides are drawn first, so that lines of methods lie on top."""
    return sorted(frameworks, key=lambda name: (not is_guide(name), name))
