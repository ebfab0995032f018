"""Charts of traffic: throughput against latency, first tokens, KV memory over time, throughput per KV byte."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from kvwise.study.axes import MEMORY, MIB, RATE
from kvwise.study.chart import Chart, Rule, Series, Shape
from kvwise.study.palette import Palette, by_block, by_strategy, short, slug
from kvwise.study.rows import Row
from kvwise.study.summary import Condition, Figures, Study, Who, condition_of, who_of
from kvwise.study.words import size


def pareto_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """Throughput against latency, a line through the request rates of each strategy."""
    for (block, model), figures in by_block(study).items():
        if not RATE.varied(figures):
            continue
        series = []
        for who, points in by_strategy(figures).items():
            found = sorted((p for p in points if 50.0 in p.e2e), key=lambda p: p.condition.rate)
            places = [(p.output_rate.value, p.e2e[50.0].value * 1e3) for p in found]
            series.append(palette.series(who, places, names=[p.condition.load_text() for p in found]))
        yield Chart(
            id=slug("pareto", block, model),
            section="Throughput against latency",
            title=short(model),
            note="each line runs through the request rates; right and low is better",
            x_label="output tokens per second",
            y_label="latency, median, ms",
            series=tuple(series),
            log_y=True,
            zero=False,
        )


def first_token_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """The distribution of TTFT over all requests at the highest rate, repeats together."""
    for (block, model), figures in by_block(study).items():
        if not RATE.varied(figures):
            continue
        condition = _hardest(figures)
        times = _first_tokens(study, condition)
        series = [_steps(palette, who, sorted(times[who])) for who in sorted(times, key=lambda w: median(times[w]))]
        yield Chart(
            id=slug("ttft-cdf", block, model),
            section="Time to first token",
            title=f"{short(model)} at {condition.load_text()}",
            note="share of requests whose first token came within the time; labels from fast to slow",
            x_label="TTFT, ms",
            y_label="requests, %",
            # Labels of lines that end at one height stay in reverse order: the last is written on top.
            series=tuple(reversed(series)),
            log_x=True,
            top=104.0,
        )


def memory_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """KV bytes per tier during one cell of each strategy: at the highest rate, and in the smallest pool."""
    for figures in by_block(study).values():
        if RATE.varied(figures):
            yield from _tier_charts(study, palette, _hardest(figures))
        elif MEMORY.varied(figures):
            yield from _tier_charts(study, palette, min(figures, key=lambda f: f.pool_bytes).condition)


def density_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """Output tokens per second for each MiB of KV held."""
    for (block, model), figures in by_block(study).items():
        if not RATE.varied(figures):
            continue
        condition = _hardest(figures)
        here = [(f.who, f.rate_per_mib) for f in figures if f.condition == condition]
        found = sorted(((who, value) for who, value in here if value is not None), key=lambda pair: pair[1])
        yield Chart(
            id=slug("density", block, model),
            section="Throughput per KV byte",
            title=f"{short(model)} at {condition.load_text()}",
            note="output tokens per second for each MiB of KV held on the device, on average over the cell",
            x_label="tok/s per MiB",
            y_label="",
            series=tuple(palette.series(who, [(float(i), value)]) for i, (who, value) in enumerate(found)),
            shape=Shape.BAR,
        )


def _hardest(figures: Sequence[Figures]) -> Condition:
    return max((f.condition for f in figures), key=lambda c: c.rate)


def _first_tokens(study: Study, condition: Condition) -> dict[Who, list[float]]:
    """TTFT of all requests in ms; at least 0.01, for the logarithmic axis."""
    out: dict[Who, list[float]] = defaultdict(list)
    for row in study.requests:
        if row["ttft_s"] is not None and condition_of(row) == condition:
            out[who_of(row)].append(max(row["ttft_s"] * 1e3, 0.01))
    return out


def _steps(palette: Palette, who: Who, ordered: Sequence[float]) -> Series:
    points = []
    for i, value in enumerate(ordered):
        points += [(value, 100 * i / len(ordered)), (value, 100 * (i + 1) / len(ordered))]
    return palette.series(who, points, markers=False)


def _tier_charts(study: Study, palette: Palette, condition: Condition) -> Iterator[Chart]:
    rows = [r for r in study.samples if r["repeat"] == 0 and condition_of(r) == condition]
    memory = "" if condition.memory == "auto" else f", pool of {condition.memory}"
    for tier in sorted({tier for row in rows for tier, used in (row["kv_bytes"] or {}).items() if used}):
        yield Chart(
            id=slug("memory", tier, condition.block, condition.model, condition.memory),
            section="KV memory over time",
            title=f"{tier}, {short(condition.model)} at {condition.load_text()}{memory}",
            note="KV held during the first repeat; shared prefixes stay cached after their requests end",
            x_label="seconds",
            y_label="KV held, MiB",
            series=tuple(_tier_series(rows, palette, tier)),
            shape=Shape.STEP,
            rules=() if tier != "device" or condition.memory == "auto" else _pool_rule(study, condition),
        )


def _pool_rule(study: Study, condition: Condition) -> tuple[Rule, ...]:
    """The size of the pool, the same for all strategies but for a block's rounding."""
    pool = max(f.pool_bytes for f in study.figures if f.condition == condition)
    return (Rule(pool / MIB, f"pool, {size(pool)}"),)


def _tier_series(rows: Sequence[Row], palette: Palette, tier: str) -> Iterator[Series]:
    lines: dict[Who, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        lines[who_of(row)].append((row["time_s"], (row["kv_bytes"] or {}).get(tier, 0) / MIB))
    for who, points in sorted(lines.items(), key=lambda item: item[0].order):
        if any(y for _, y in points):
            yield palette.series(who, sorted(points), markers=False)
