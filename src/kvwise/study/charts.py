"""Which charts a study is shown with: those of its traffic, of its agreement, and of the cache on and off."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from kvwise.study.axes import OTHER_AXES, RATE, axis_charts, scaled
from kvwise.study.chart import Chart, Rule, Series
from kvwise.study.palette import Palette, short, slug
from kvwise.study.summary import AgreementFigures, Study
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
    charts = [
        *_throttled(traffic, study),
        *_agreement_charts(study, palette),
        *_throttled(others, study),
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


def _agreement_charts(study: Study, palette: Palette) -> Iterator[Chart]:
    """Top-1 agreement and KL against the budget."""
    for kind, y_label in (("top-1", "same most likely token, %"), ("KL", "KL(full ‖ method), nats")):
        for model, context in dict.fromkeys((a.model, a.context) for a in study.agreements):
            here = [a for a in study.agreements if (a.model, a.context) == (model, context)]
            budgets = sorted({a.who.budget for a in here if a.who.budget is not None}, reverse=True)
            if len(budgets) < 2:
                continue
            yield Chart(
                id=slug("agreement", kind, model, context),
                section="Agreement with the full cache",
                title=f"{kind}, {short(model)}, context {context}",
                note="the full cache's greedy answers forced on each strategy; bars: 95 % intervals over prompts",
                x_label="KV budget",
                y_label=y_label,
                series=tuple(_agreement_series(here, budgets, kind, palette)),
                top=104.0 if kind == "top-1" else None,
                ticks=tuple((float(i), f"{b * 100:g} %") for i, b in enumerate(budgets)),
            )


def _agreement_series(
    here: Sequence[AgreementFigures], budgets: Sequence[float], kind: str, palette: Palette
) -> Iterator[Series]:
    """A line per framework; a strategy without a budget is a level across all of them."""
    for framework in dict.fromkeys(a.who.framework for a in here):
        own = [a for a in here if a.who.framework == framework]
        values = [v for a in own if (v := scaled(a.top1, 100) if kind == "top-1" else a.kl) is not None]
        base = Series(framework, palette.colours[framework], (), ())
        if own[0].who.budget is None:
            level = (values[0].value,) * len(budgets)
            yield replace(base, x=tuple(map(float, range(len(budgets)))), y=level, markers=False)
            continue
        yield replace(
            base,
            x=tuple(float(budgets.index(a.who.budget)) for a in own if a.who.budget is not None),
            y=tuple(v.value for v in values),
            low=tuple(v.low for v in values),
            high=tuple(v.high for v in values),
        )


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
