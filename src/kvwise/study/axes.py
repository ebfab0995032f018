"""Metrics against every axis that a block of the plan varies."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvwise.study.bootstrap import Interval
from kvwise.study.chart import Chart
from kvwise.study.palette import Palette, by_block, by_strategy, short, slug
from kvwise.study.placement import brief
from kvwise.study.plan import Plan
from kvwise.study.summary import Condition, Figures, Study
from kvwise.study.verdict import has_levels

MIB = 2**20
BARS = "bars: bootstrap 95 % intervals over repeats and requests"


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that is drawn against an axis."""

    key: str
    title: str
    y_label: str
    value: Callable[[Figures], Interval | None]
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis that a block can vary: where a condition stands on it, and what is drawn along it."""

    key: str
    section: str
    x_label: str
    place: Callable[[Condition], float | str]
    metrics: tuple[Metric, ...]
    endless: str = "unlimited"  # what stands for an infinite place

    def word(self, place: float | str) -> str:
        """A place as it is written."""
        return place if isinstance(place, str) else self.endless if place == float("inf") else f"{place:g}"

    def varied(self, figures: Sequence[Figures]) -> bool:
        """Whether the figures stand at two places or more."""
        return len({self.place(f.condition) for f in figures}) > 1


def scaled(interval: Interval | None, scale: float) -> Interval | None:
    """An interval in another unit."""
    return interval and Interval(interval.value * scale, interval.low * scale, interval.high * scale)


def _found(figures: Figures) -> Interval:
    value = 100 * (sum(figures.tier_shares.values()) or figures.hit_ratio or 0.0)
    return Interval(value, value, value)


def _peak(figures: Figures) -> Interval:
    value = figures.peak_kv.get("device", 0.0) / MIB
    return Interval(value, value, value)


GOODPUT = Metric("goodput", "Goodput", "good requests per second", lambda f: f.goodput)
OUTPUT = Metric("throughput", "Throughput", "output tokens per second", lambda f: f.output_rate)
TPOT = Metric("tpot", "Time per output token", "TPOT, median, ms", lambda f: scaled(f.tpot.get(50.0), 1e3), True)
TTFT = Metric("ttft", "Time to first token", "TTFT, median, ms", lambda f: scaled(f.ttft.get(50.0), 1e3), True)
E2E = Metric("e2e", "Latency end to end", "latency, median, ms", lambda f: scaled(f.e2e.get(50.0), 1e3), True)
HITS = Metric("hits", "Prompt tokens found", "% on the device or below", lambda f: _found(f))
PEAK = Metric("peak", "Peak KV on the device", "MiB", _peak)

RATE = Axis("rate", "Over the request rate", "requests per second", lambda c: c.rate, (GOODPUT, TPOT, TTFT))
MEMORY = Axis("memory", "Over the KV memory", "KV pool", lambda c: c.memory, (OUTPUT, TTFT))
OTHER_AXES = (
    Axis("concurrency", "Over concurrency", "requests at a time", lambda c: c.concurrency, (OUTPUT, TPOT)),
    Axis("context", "Over context length", "prompt tokens", lambda c: float(c.context), (E2E, PEAK)),
    MEMORY,
    Axis("tiers", "Over the tiers", "tiers below the device", lambda c: brief(c.tiers) or "none", (TTFT, OUTPUT, HITS)),
    Axis("links", "Over link bandwidths", "throttled links", lambda c: c.throttles or "as they are", (TTFT, OUTPUT)),
    Axis("ttl", "Over the time to live", "TTL, s", lambda c: c.ttl_s, (HITS, TTFT), "none"),
    Axis("idle-ttl", "Over the idle time to live", "idle TTL, s", lambda c: c.idle_ttl_s, (HITS, TTFT), "none"),
)


def axis_charts(study: Study, palette: Palette, axis: Axis) -> list[Chart]:
    """The axis' metrics for every block and model that varies it, one chart for each place on their other axes."""
    return [
        _chart(study.plan, palette, axis, metric, line, where)
        for metric in axis.metrics
        for figures in by_block(study).values()
        for where, line in _lines(figures, axis).items()
        if axis.varied(line)
    ]


def _lines(figures: Sequence[Figures], axis: Axis) -> dict[str, list[Figures]]:
    """Figures that differ in nothing but `axis` and strategy, by the words for all else that the block varies."""
    others = [other for other in (RATE, *OTHER_AXES) if other is not axis and other.varied(figures)]
    out: dict[str, list[Figures]] = defaultdict(list)
    for f in figures:
        places = ((other, other.place(f.condition)) for other in others)
        out["".join(f", {other.x_label}: {other.word(place)}" for other, place in places)].append(f)
    return out


def _chart(
    plan: Plan, palette: Palette, axis: Axis, metric: Metric, figures: Sequence[Figures], elsewhere: str
) -> Chart:
    if metric is GOODPUT and not has_levels(plan):
        metric = OUTPUT
    ticks = _ticks(figures, axis)
    series = []
    bars = metric not in (PEAK, HITS)
    for who, points in by_strategy(figures).items():
        found = [(ticks[axis.place(p.condition)][0], value) for p in points if (value := metric.value(p)) is not None]
        found.sort(key=lambda pair: pair[0])
        line = palette.series(who, [(x, v.value) for x, v in found])
        low, high = tuple(v.low for _, v in found), tuple(v.high for _, v in found)
        series.append(replace(line, low=low if bars else None, high=high if bars else None))
    first = figures[0].condition
    where = "" if axis is RATE or axis.key == "concurrency" else f", {first.load_text()}"
    return Chart(
        id=slug(metric.key, axis.key, first.block, first.model, elsewhere),
        section=axis.section,
        title=f"{metric.title}, {short(first.model)}{elsewhere or where}",
        note=f"{_levels(plan)}; {BARS}" if metric is GOODPUT else BARS if bars else "",
        x_label=axis.x_label,
        y_label=metric.y_label,
        series=tuple(series),
        log_y=metric.log_y,
        zero=not metric.log_y,
        ticks=tuple(ticks.values()),
    )


def _levels(plan: Plan) -> str:
    names = (("TTFT", plan.slo.ttft_ms), ("TPOT", plan.slo.tpot_ms), ("latency", plan.slo.e2e_ms))
    return "good: " + " and ".join(f"{name} ≤ {value:g} ms" for name, value in names if value is not None)


def _ticks(figures: Sequence[Figures], axis: Axis) -> dict[float | str, tuple[float, str]]:
    """Place on the axis -> (x, words). Values stand at even distances: they are few and far apart."""
    pools = {axis.place(f.condition): f.pool_bytes for f in figures}
    ordered = list(pools)  # the plan's order, which is all there is among tiers and links
    if axis is MEMORY or not any(isinstance(place, str) for place in pools):
        ordered = sorted(pools, key=lambda place: pools[place] if isinstance(place, str) else place)
    return {place: (float(i), axis.word(place)) for i, place in enumerate(ordered)}
