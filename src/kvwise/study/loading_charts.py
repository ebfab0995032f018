"""Charts of loading: the time to the first token over bandwidth and length, and where tokens were found."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kvwise.study.chart import COLOURS, SPARE, Chart, Series, Shape
from kvwise.study.loading_figures import LoadingFigures, Place, Timing
from kvwise.study.loading_section import COMPUTE, LOAD
from kvwise.study.palette import short, slug
from kvwise.study.summary import Condition, Figures, Study

LOADING = "Loading"
TIERS = "Hit ratio by tier"
OPTIMUM = "Tc·Tl/(Tc+Tl)"
COLOUR = {COMPUTE: "#8b93a7", LOAD: "#3e7bfa", "cake": "#e0526e", "layerwise": "#12a67c", "cachegen": "#a46cf2"}
TIER_COLOUR = {"device": COLOURS["full"], "host": "#3e7bfa", "disk": "#ee8a1d", "redis": "#e0526e", "object": "#a46cf2",
               "memory": "#12a67c"}  # fmt: skip
BARS = "bars: least and most of the runs"
FEW = 2  # points that make a line


def loading_charts(study: Study) -> list[Chart]:
    """Over bandwidth at the longest prefix and over length at the bandwidth nearest the break-even, for each share."""
    groups: dict[tuple[str, str, float, int], list[LoadingFigures]] = defaultdict(list)
    for f in study.loading:
        groups[f.place.block, f.place.model, f.place.share, f.place.num_others].append(f)
    charts: list[Chart] = []
    for figures in groups.values():
        longest = max(f.place.context for f in figures)
        charts += _chart("bandwidth", "link bandwidth, MB/s", [f for f in figures if f.place.context == longest])
        near = min(figures, key=lambda f: abs(f.bytes_per_s / f.break_even - 1)).place.bandwidth
        charts += _chart("length", "prefix tokens", [f for f in figures if f.place.bandwidth == near])
    return charts


def _chart(key: str, x_label: str, figures: Sequence[LoadingFigures]) -> Iterator[Chart]:
    xs = {f.place: f.bytes_per_s / 1e6 if key == "bandwidth" else float(f.place.context) for f in figures}
    if len(set(xs.values())) < FEW:
        return
    place = figures[0].place
    names = list(dict.fromkeys(name for f in figures for name in f.methods))
    spare = iter(SPARE * len(names))
    series = [
        _line(name, COLOUR.get(name.partition("(")[0]) or next(spare), xs, _of_method(figures, name)) for name in names
    ]
    best = {f.place: f.optimum for f in figures if f.optimum is not None}
    if best:
        points = sorted((xs[p], t.value * 1e3) for p, t in best.items())
        series.append(Series(OPTIMUM, "#717a8c", *_columns(points), guide=True, markers=False))
    share = "" if place.share == 1 else f", {place.share * 100:g} % of each step"
    fixed = f"{place.context} tokens" if key == "bandwidth" else f"{figures[0].bytes_per_s / 1e6:.3g} MB/s"
    beside = f", with {place.num_others} short requests" if place.num_others else ""
    yield Chart(
        id=slug("loading", key, place.block, place.model, f"{place.share:g}"),
        section=LOADING,
        title=f"{short(place.model)}, {place.block}: {fixed}{share}{beside}",
        note="time to the first token of a request whose prefix lies below, over a throttled link; dashed: the best "
        f"that computing and loading can do together, from what each took alone in the same run; {BARS}",
        x_label=f"{x_label} (throttled)" if key == "bandwidth" else x_label,
        y_label="TTFT, median, ms",
        series=tuple(series),
        log_x=True,
        log_y=True,
        zero=False,
    )


def _of_method(figures: Sequence[LoadingFigures], name: str) -> dict[Place, Timing]:
    return {f.place: f.methods[name].ttft for f in figures if name in f.methods}


def _line(name: str, colour: str, xs: dict[Place, float], times: dict[Place, Timing]) -> Series:
    found = sorted((xs[p], t.value * 1e3, t.low * 1e3, t.high * 1e3) for p, t in times.items())
    x, y = _columns([(a, b) for a, b, _, _ in found])
    return Series(name, colour, x, y, tuple(low for *_, low, _ in found), tuple(high for *_, high in found))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


# -- traffic over tiers -----------------------------------------------------------------------------------------------


def tier_charts(study: Study) -> Iterator[Chart]:
    """Of each place of traffic over tiers, which share of the prompt tokens was found where."""
    groups: dict[Condition, list[Figures]] = defaultdict(list)
    for f in study.figures:
        if f.condition.tiers and len(f.tier_shares) > 1:
            groups[f.condition].append(f)
    for condition, figures in _hardest(groups).items():
        bars = [
            Series(f"{tier} · {_loads(f.who.label)}", TIER_COLOUR.get(tier, SPARE[0]), (float(i),), (100 * share,))
            for f in reversed(figures)
            for i, (tier, share) in enumerate(reversed(sorted_tiers(f.tier_shares)))
        ]
        yield Chart(
            id=slug("found", condition.block, condition.model, condition.placed),
            section=TIERS,
            title=f"{short(condition.model)} at {condition.load_text()}{condition.placed}",
            note="share of the prompt tokens looked up that was found in each tier; what the device has is not sought",
            x_label="% of prompt tokens",
            y_label="",
            series=tuple(bars),
            shape=Shape.BAR,
        )


def _hardest(groups: dict[Condition, list[Figures]]) -> dict[Condition, list[Figures]]:
    """One condition of each placement: that of the highest rate, the most at a time, the longest context."""
    best: dict[tuple[object, ...], Condition] = {}
    for c in groups:
        key = (c.block, c.model, c.tiers, c.throttles, c.kept)
        best[key] = max(best.get(key, c), c, key=lambda c: (c.rate, c.concurrency, c.context))
    return {c: groups[c] for c in best.values()}


def sorted_tiers(shares: dict[str, float]) -> list[tuple[str, float]]:
    """Tiers from fast to slow."""
    order = list(TIER_COLOUR)
    return sorted(shares.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _loads(label: str) -> str:
    """The loading method of a strategy's label, which is what differs: `cake` of `full+prefix+cake`."""
    return label.rpartition("+")[2]
