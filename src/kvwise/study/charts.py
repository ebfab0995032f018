"""Which charts a study is shown with: those of its quality, of its traffic, and of the cache on and off."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from kvwise.study.axes import OTHER_AXES, RATE, axis_charts
from kvwise.study.chart import Chart, Rule, Series
from kvwise.study.front_charts import front_charts
from kvwise.study.loading_charts import loading_charts, tier_charts
from kvwise.study.palette import Palette, short
from kvwise.study.quality_charts import quality_charts
from kvwise.study.quality_looks import QUALITY
from kvwise.study.summary import Study
from kvwise.study.traffic_charts import density_charts, first_token_charts, memory_charts, pareto_charts
from kvwise.study.words import ARTICLE

SIDES = {
    "hf-off": ("transformers, no cache", "#e0526e"),
    "hf-on": ("transformers, cache", "#8b93a7"),
    "kvwise": ("kvwise", "#3e7bfa"),
}


def study_charts(study: Study) -> list[Chart]:
    """All charts of a study, in the order of the page."""
    palette = Palette(study)
    traffic = [
        *pareto_charts(study, palette),
        *first_token_charts(study, palette),
        *axis_charts(study, palette, RATE),
        *memory_charts(study, palette),
        *density_charts(study, palette),
    ]
    others = [chart for axis in OTHER_AXES for chart in axis_charts(study, palette, axis)]
    quality = [*_throttled(list(front_charts(study, palette)), study), *quality_charts(study, palette)]
    charts = [
        *(c for c in quality if c.section == QUALITY),
        *_throttled(traffic, study),
        *(c for c in quality if c.section != QUALITY),
        *_throttled(others, study),
        *_throttled(list(tier_charts(study)), study),
        *loading_charts(study),
        *_onoff_charts(study),
    ]
    return [chart for chart in charts if any(s.x for s in chart.series)]


def _throttled(charts: Sequence[Chart], study: Study) -> list[Chart]:
    """The charts with the throttled links named below their titles: no such figure may pass for a real link's."""
    links = "; ".join(f"link {name}: {text}" for name, text in sorted(study.links.items()))
    return [replace(c, note="; ".join(filter(None, (c.note, links)))) for c in charts]


def onoff_times(study: Study) -> dict[tuple[str, int], float]:
    """Median seconds to the last token by (side, output tokens)."""
    out: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in study.onoff:
        out[row["side"], row["num_output_tokens"]].append(row["total_s"])
    return {key: median(values) for key, values in out.items()}


def _onoff_charts(study: Study) -> Iterator[Chart]:
    """Seconds with and without the KV cache, and how many times faster it is."""
    times = onoff_times(study)
    lengths = sorted({length for _, length in times})
    if not lengths:
        return
    xs = tuple(map(float, range(len(lengths))))
    sides = {side: SIDES[side] for side in SIDES if all((side, n) in times for n in lengths)}
    base = Chart(
        id="onoff-seconds",
        section="KV cache on and off",
        title=f"{short(study.onoff[0]['model'])}: seconds to the last token",
        note="greedy tokens are identical on all sides",
        x_label="output tokens",
        y_label="seconds, median",
        series=tuple(
            Series(label.removeprefix("transformers, "), colour, xs, tuple(times[side, n] for n in lengths))
            for side, (label, colour) in sides.items()
        ),
        log_y=True,
        zero=False,
        ticks=tuple((float(i), str(n)) for i, n in enumerate(lengths)),
    )
    yield base
    yield replace(
        base,
        id="onoff-ratio",
        title=f"{short(study.onoff[0]['model'])}: times faster than without a cache",
        note=f"dotted: {ARTICLE}",
        y_label="times faster",
        series=tuple(
            Series(label.partition(",")[0], colour, xs, tuple(times["hf-off", n] / times[side, n] for n in lengths))
            for side, (label, colour) in sides.items()
            if side != "hf-off"
        ),
        log_y=False,
        zero=True,
        rules=(Rule(2.91, "2.91×, the article's"),),
    )
