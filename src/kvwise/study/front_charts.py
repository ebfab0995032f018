"""Score against throughput and KV memory at once: who is dominated by nobody."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvwise.study.axes import MIB, RATE
from kvwise.study.chart import NEUTRAL, Chart, Series
from kvwise.study.palette import Palette, by_block, by_strategy, plain, short, slug
from kvwise.study.pareto import front
from kvwise.study.quality_looks import LABELS, bars, floor_rule, section_of, top
from kvwise.study.scores import Basis
from kvwise.study.summary import Condition, Figures, Study
from kvwise.study.who import Who
from kvwise.study.words import budget as budget_text
from kvwise.study.words import number, score, size

SMALLEST, LARGEST = 7.0, 24.0  # marker diameters in pixels


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
        top=top(basis),
        series=(*([line] if len(ends) > 1 else []), *_front_series(palette, here, filled, most)),
        rules=floor_rule(study),
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
            **bars(errors, bounded=own[0].quality is not None and own[0].quality.basis == Basis.AGREEMENT),
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
