"""Draws a chart with matplotlib, for papers and slides: the same lines, colours and labels as on the page."""

from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import blended_transform_factory

from kvwise.study.chart import Chart, Series, Shape
from kvwise.study.words import number

STYLES = ("-", "--", ":", "-.", (0, (6, 2)))
GUIDE = (0, (4, 3))
MARKERS = ("o", "s", "D", "^", "X")
INK, SOFT, FAINT = "#1d2330", "#5b6475", "#d9dde6"
_NEAR_TOP = 0.94  # of the height of the axes


def write_png(chart: Chart, path: Path) -> None:
    """Draw `chart` into the file `path`. Drawn without pyplot: nothing of the process's own state is touched."""
    figure = Figure(figsize=(6.4, 4.0), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    top = _heading(figure, chart)
    # Names at the ends of lines take what they need on the right, but leave half of the figure to the lines.
    longest = max((len(s.label) for s in chart.series), default=0)
    axes = figure.add_axes((0.12, 0.13, max(0.5, min(0.68, 0.86 - 0.0085 * longest)), top - 0.13))
    if chart.shape is Shape.BAR:
        axes.set_position((0.2, 0.13, 0.72, top - 0.13))
        _bars(axes, chart)
    else:
        _lines(axes, chart)
    figure.savefig(path)


def _heading(figure: Figure, chart: Chart) -> float:
    """Title and note, broken where they would be cut; the height on the figure below which there is room."""
    place = 0.985
    for text, size, width, weight in (
        (f"{chart.section}: {chart.heading}", 11.0, 72, "bold"),
        (chart.note, 7.5, 118, "normal"),
    ):
        lines = wrap(text, width)
        ink = INK if weight == "bold" else SOFT
        figure.text(0.02, place, "\n".join(lines), fontsize=size, fontweight=weight, color=ink, va="top")
        place -= 0.0047 * size * len(lines) + 0.01
    return min(0.83, place - 0.035)


def _lines(axes: Axes, chart: Chart) -> None:
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    # Limits come first: matplotlib would look for its own, and warn where all values are one.
    low, high = chart.y_range
    limits = (10**low, 10**high) if chart.log_y else (low, high)
    axes.set_ylim(*limits)
    for series in chart.series:
        if series.x:
            _line(axes, series, chart)
    if chart.y_ticks:
        axes.set_yticks(chart.y_ticks)
        axes.set_ylim(*limits)
    if chart.log_x:
        axes.set_xlim(axes.get_xlim())
        axes.set_xticks(chart.x_ticks)
    if chart.reverse_x:
        axes.invert_xaxis()
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [text for _, text in chart.ticks])
        axes.set_xlim(chart.ticks[0][0] - 0.15, chart.ticks[-1][0] + 0.08)
    margin = blended_transform_factory(axes.transAxes, axes.transData)
    for series, height in chart.end_labels():
        y = 10**height if chart.log_y else height
        axes.text(1.02, y, series.label, transform=margin, color=series.colour, fontsize=8, va="center")
    for rule in chart.rules:
        axes.axhline(rule.y, color=INK, linestyle=":", linewidth=1)
        place, side = (0.99, "right") if rule.at_end else (0.01, "left")
        height = axes.transAxes.inverted().transform(axes.transData.transform((1, rule.y)))[1]
        where = "top" if height > _NEAR_TOP else "bottom"  # above there, it would stand on the frame
        axes.text(place, rule.y, rule.text, transform=margin, fontsize=7, va=where, ha=side, color=INK)
    _dress(axes, chart)


def _line(axes: Axes, series: Series, chart: Chart) -> None:
    rank = min(series.rank, len(STYLES) - 1)
    axes.plot(
        series.x,
        series.y,
        color=series.colour,
        linestyle=(GUIDE if series.guide else STYLES[rank]) if series.joined else "none",
        marker=MARKERS[rank] if series.markers and not series.sizes else None,
        markersize=3.5 if series.guide else 4.5,
        linewidth=1.2 if series.guide else 1.9 if rank == 0 else 1.4,
        drawstyle="steps-post" if chart.shape is Shape.STEP else "default",
        clip_on=False,
    )
    if series.low is not None and series.high is not None:
        axes.vlines(series.x, series.low, series.high, color=series.colour, linewidth=1)
    if series.sizes:
        _points(axes, series)
    for x, y, text in zip(series.x, series.y, series.captions, strict=False):
        axes.annotate(
            text, (x, y), (0, -7), textcoords="offset points", ha="center", va="top", fontsize=6.5, color=series.colour
        )


def _points(axes: Axes, series: Series) -> None:
    """Markers of differing size, some of them hollow."""
    hollow = series.hollow or (False,) * len(series.x)
    axes.scatter(
        series.x,
        series.y,
        s=[(0.55 * size) ** 2 for size in series.sizes],  # pixels on the page -> square points here
        facecolors=["white" if empty else series.colour for empty in hollow],
        edgecolors=series.colour,
        linewidths=1.3,
        clip_on=False,
        zorder=3,
    )


def _bars(axes: Axes, chart: Chart) -> None:
    for place, series in enumerate(chart.series):
        axes.barh(place, series.y[0], height=0.62, color=series.colour, alpha=1.0 - 0.22 * min(series.rank, 3))
        axes.text(series.y[0], place, f" {number(series.y[0])}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(chart.series)), [s.label for s in chart.series])
    axes.margins(x=0.12)
    _dress(axes, chart)


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x_label, fontsize=9, color=INK)
    axes.set_ylabel(chart.y_label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for axis, log in ((axes.xaxis, chart.log_x), (axes.yaxis, chart.log_y)):
        if log:
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            axis.set_minor_formatter(NullFormatter())
