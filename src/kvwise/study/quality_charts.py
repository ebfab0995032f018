"""Charts of quality: per task against the budget, against KV bytes, and against throughput and memory at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypedDict

from kvwise.study.axes import MIB, RATE
from kvwise.study.chart import NEUTRAL, Chart, Rule, Series
from kvwise.study.estimate import Estimate
from kvwise.study.palette import Palette, by_block, by_strategy, is_guide, plain, short, slug
from kvwise.study.scores import Basis, QualityFigures, TaskFigures
from kvwise.study.summary import Condition, Figures, Study
from kvwise.study.who import Who
from kvwise.study.words import budget as budget_text
from kvwise.study.words import number, score, size

QUALITY, AGREEMENT = "Quality", "Agreement with the full cache"
BARS = "bars: 95 %, ±1.96 standard errors by episode"
GUIDES = "dashed grey: guides, which choose blindly"
FORCED = "the full cache's greedy answers forced on each strategy"
LABELS = {str(Basis.TASKS): "score, full cache = 1", str(Basis.AGREEMENT): "same most likely token, share"}
DODGE = 0.018  # points of one budget stand beside each other, in steps of the axis
SMALLEST, LARGEST = 7.0, 24.0  # marker diameters in pixels


class _Bars(TypedDict):
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None


Pick = Callable[[QualityFigures], Estimate | None]


def quality_charts(study: Study, palette: Palette) -> list[Chart]:
    """Charts of what was answered, per model and context length: against the budget, and against KV bytes."""
    groups: dict[tuple[str, str, int], list[QualityFigures]] = {}
    for q in study.qualities:
        groups.setdefault((q.basis, q.model, q.context), []).append(q)
    return [chart for here in groups.values() for chart in _group_charts(study, palette, here)]


def section_of(basis: str) -> str:
    """The section in which figures of a basis are shown: agreement is no quality and does not pass for it."""
    return QUALITY if basis == Basis.TASKS else AGREEMENT


def _group_charts(study: Study, palette: Palette, here: Sequence[QualityFigures]) -> Iterator[Chart]:
    first = here[0]
    rules = _floor(study)
    if first.basis == Basis.TASKS:
        yield from _against_budget(here, palette, "score", lambda q: q.score, LABELS[first.basis], rules)
        yield from _bytes_chart(here, palette, rules)
        for key in dict.fromkeys((t.task, t.protocol) for q in here for t in q.tasks):
            yield from _task_chart(here, palette, *key)
        return
    yield from _against_budget(here, palette, "top-1", lambda q: q.top1, LABELS[first.basis], rules)
    yield from _against_budget(here, palette, "KL", lambda q: q.kl, "KL(full ‖ method), nats", ())
    yield from _bytes_chart(here, palette, rules)


def _floor(study: Study) -> tuple[Rule, ...]:
    floor = study.plan.min_quality
    return () if floor is None else (Rule(floor, f"quality floor, {number(floor)}", at_end=True),)


def _top(basis: str) -> float | None:
    """The y axis' end, where there is one by nature: a score may be above the full cache's."""
    return 1.04 if basis == Basis.AGREEMENT else None


def _bars(found: Sequence[Estimate], bounded: bool) -> _Bars:
    """Ends of error bars, inside what is possible; none where nothing has an error."""
    if not any(e.error for e in found):
        return {"low": None, "high": None}
    return {
        "low": tuple(max(e.low, 0.0) for e in found),
        "high": tuple(min(e.high, 1.0) if bounded else e.high for e in found),
    }


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
    yield Chart(
        id=slug("quality" if first.basis == Basis.TASKS else "agreement", name, first.model, first.context),
        section=section_of(first.basis),
        title=f"{name}, {short(first.model)}, context {first.context}",
        note="; ".join(filter(None, (BARS, GUIDES if guides else "", "" if first.basis == Basis.TASKS else FORCED))),
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
    for place, framework in enumerate(frameworks):
        offset = DODGE * (place - (len(frameworks) - 1) / 2)
        own = [(q.who.budget, e) for q in here if q.who.framework == framework and (e := pick(q)) is not None]
        points = sorted((budgets.index(b) + offset, b, e) for b, e in own if b is not None)
        if points:
            yield Series(
                plain(framework),
                palette.colours[framework],
                tuple(x for x, _, _ in points),
                tuple(e.value for _, _, e in points),
                **_bars([e for _, _, e in points], bounded),
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
    for height, names in by_height.items():
        label = plain(names[0]) if len(names) == 1 else f"{plain(names[0])} and {len(names) - 1} more"
        yield Series(
            label, palette.colours[names[0]], ends, (height, height), markers=False, names=(", ".join(names),) * 2
        )


def _guides_first(frameworks: Sequence[str] | dict[str, None]) -> list[str]:
    """Guides are drawn first, so that lines of methods lie on top."""
    return sorted(frameworks, key=lambda name: (not is_guide(name), name))


# -- against memory ---------------------------------------------------------------------------------------------------


def _bytes_chart(here: Sequence[QualityFigures], palette: Palette, rules: tuple[Rule, ...]) -> Iterator[Chart]:
    """The score against KV bytes per token on the device, from many to few."""
    points = [q for q in here if q.score is not None and q.kv_bytes_per_token.get("device", 0.0) > 0]
    if len({q.kv_bytes_per_token["device"] for q in points}) < 2:
        return
    first = here[0]
    name = "score" if first.basis == Basis.TASKS else "top-1"
    yield Chart(
        id=slug("quality-bytes", first.model, first.context),
        section=section_of(first.basis),
        title=f"{name} against memory, {short(first.model)}, context {first.context}",
        note="; ".join(filter(None, (BARS, _host_note(points)))),
        x_label="KV bytes per token on the device",
        y_label=LABELS[first.basis],
        series=tuple(_bytes_series(points, palette)),
        top=_top(first.basis),
        log_x=True,
        reverse_x=True,
        rules=rules,
    )


def _bytes_series(points: Sequence[QualityFigures], palette: Palette) -> Iterator[Series]:
    for framework in _guides_first({q.who.framework: None for q in points}):
        own = [(q, q.score) for q in points if q.who.framework == framework and q.score is not None]
        own.sort(key=lambda pair: -pair[0].kv_bytes_per_token["device"])
        yield Series(
            plain(framework),
            palette.colours[framework],
            tuple(q.kv_bytes_per_token["device"] for q, _ in own),
            tuple(e.value for _, e in own),
            **_bars([e for _, e in own], bounded=own[0][0].basis == Basis.AGREEMENT),
            names=tuple(_bytes_name(q) for q, _ in own),
            guide=is_guide(framework),
        )


def _bytes_name(q: QualityFigures) -> str:
    tiers = ", ".join(f"{size(v)} {tier}" for tier, v in sorted(q.kv_bytes_per_token.items()) if v)
    return tiers if q.who.budget is None else f"{tiers} (budget {budget_text(q.who.budget)})"


def _host_note(points: Sequence[QualityFigures]) -> str:
    """What the axis leaves out: bytes that wait on other tiers."""
    held: dict[str, float] = {}
    for q in points:
        others = sum(v for tier, v in q.kv_bytes_per_token.items() if tier != "device")
        if others:
            held[q.who.framework] = max(held.get(q.who.framework, 0.0), others)
    told = ", ".join(f"{name} {size(value)}" for name, value in held.items())
    return f"not on this axis, per token on the host: {told}" if told else ""


# -- against throughput and memory ------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, ...]]) -> tuple[bool, ...]:
    """Which points are dominated by no other: none is as good in everything and better in something. More is better."""
    return tuple(not any(_dominates(other, point) for other in points) for point in points)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def front_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """Score against throughput with the KV held on the device, of each model's blocks at their hardest condition.

    Blocks that vary the request rate; of a model that has none, its first block.
    """
    done: set[str] = set()
    ordered = sorted(by_block(study).values(), key=lambda figures: not RATE.varied(figures))
    for figures in ordered:
        model = figures[0].condition.model
        if model in done and not RATE.varied(figures):
            continue
        hardest = max((f.condition for f in figures), key=_hardness)
        here = [f for f in figures if f.condition == hardest and f.quality is not None and f.quality.score is not None]
        if len(here) > 1:
            done.add(model)
            yield _front_chart(study, palette, hardest, here)


def _hardness(condition: Condition) -> tuple[float, float, int]:
    return condition.rate, condition.concurrency, condition.context


def _front_chart(study: Study, palette: Palette, condition: Condition, here: Sequence[Figures]) -> Chart:
    best = front([(f.output_rate.value, _score(f), -_held(f)) for f in here])
    pairs = front([(f.output_rate.value, _score(f)) for f in here])
    filled = {f.who: flag for f, flag in zip(here, best, strict=True)}
    ends = sorted((f.output_rate.value, _score(f)) for f, flag in zip(here, pairs, strict=True) if flag)
    quality = here[0].quality
    basis = Basis.TASKS if quality is None else quality.basis
    line = Series("", NEUTRAL, tuple(x for x, _ in ends), tuple(y for _, y in ends), markers=False)
    most = max(map(_held, here))
    return Chart(
        id=slug("quality-front", condition.block, condition.model),
        section=section_of(basis),
        title=f"{short(condition.model)}: quality, memory and throughput at {condition.load_text()}",
        note=(
            f"marker: KV held on the device, largest {size(most)}; filled: nobody is at least as good in all three and "
            "better in one; line: nobody is both faster and better; small print: budget; point values"
        ),
        x_label="output tokens per second",
        y_label=LABELS[basis],
        top=_top(basis),
        series=(*([line] if len(ends) > 1 else []), *_front_series(palette, here, filled, most)),
        rules=_floor(study),
    )


def _front_series(palette: Palette, here: Sequence[Figures], filled: dict[Who, bool], most: float) -> Iterator[Series]:
    groups: dict[str, list[Figures]] = {}
    for who, points in by_strategy(here).items():
        groups.setdefault(who.framework, []).extend(points)
    for framework, own in groups.items():
        own.sort(key=lambda f: f.output_rate.value)
        base = palette.series(own[0].who, [(f.output_rate.value, _score(f)) for f in own])
        errors = [e for f in own if f.quality is not None and (e := f.quality.score) is not None]
        yield replace(
            base,
            label=plain(framework),
            rank=0,
            **_bars(errors, bounded=own[0].quality is not None and own[0].quality.basis == Basis.AGREEMENT),
            joined=False,
            hollow=tuple(not filled[f.who] for f in own),
            sizes=tuple(SMALLEST + (LARGEST - SMALLEST) * math.sqrt(_held(f) / most if most else 0.0) for f in own),
            captions=tuple("" if f.who.budget is None else budget_text(f.who.budget) for f in own),
            names=tuple(map(_front_name, own)),
        )


def _score(figures: Figures) -> float:
    assert figures.quality is not None and figures.quality.score is not None
    return figures.quality.score.value


def _held(figures: Figures) -> float:
    return figures.mean_kv.get("device", 0.0)


def _front_name(figures: Figures) -> str:
    held = f"{number(_held(figures) / MIB)} MiB of KV"
    return f"{number(figures.output_rate.value)} ({figures.who.label}, {held}, {score(figures.quality)})"
