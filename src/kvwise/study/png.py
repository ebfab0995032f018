"""Draws a chart with matplotlib, for papers and slides: the same lines, colours and labels as on the page."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import blended_transform_factory

from kvwise.study.chart import Chart, Series, Shape
from kvwise.study.words import number

STYLES = ("-", "--", ":", "-.", (0, (6, 2)))
MARKERS = ("o", "s", "D", "^", "X")
INK, FAINT = "#1d2330", "#d9dde6"


def write_png(chart: Chart, path: Path) -> None:
    """Draw `chart` into the file `path`. Drawn without pyplot: nothing of the process's own state is touched."""
    figure = Figure(figsize=(6.4, 4.0), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.12, 0.13, 0.68, 0.70))
    if chart.shape is Shape.BAR:
        axes.set_position((0.2, 0.13, 0.72, 0.70))
        _bars(axes, chart)
    else:
        _lines(axes, chart)
    figure.text(0.02, 0.94, f"{chart.section}: {chart.title}", fontsize=11, fontweight="bold", color=INK)
    figure.text(0.02, 0.885, chart.note, fontsize=7.5, color="#5b6475")
    figure.savefig(path)


def _lines(axes: Axes, chart: Chart) -> None:
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    for series in chart.series:
        if series.x:
            _line(axes, series, chart)
    if chart.y_ticks:
        axes.set_yticks(chart.y_ticks)
    low, high = chart.y_range
    axes.set_ylim(*((10**low, 10**high) if chart.log_y else (low, high)))
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [text for _, text in chart.ticks])
        axes.set_xlim(chart.ticks[0][0] - 0.15, chart.ticks[-1][0] + 0.08)
    margin = blended_transform_factory(axes.transAxes, axes.transData)
    for series, height in chart.end_labels():
        y = 10**height if chart.log_y else height
        axes.text(1.02, y, series.label, transform=margin, color=series.colour, fontsize=8, va="center")
    for rule in chart.rules:
        axes.axhline(rule.y, color=INK, linestyle=":", linewidth=1)
        axes.text(0.01, rule.y, rule.text, transform=margin, fontsize=7, va="bottom", color=INK)
    _dress(axes, chart)


def _line(axes: Axes, series: Series, chart: Chart) -> None:
    rank = min(series.rank, len(STYLES) - 1)
    axes.plot(
        series.x,
        series.y,
        color=series.colour,
        linestyle=STYLES[rank],
        marker=MARKERS[rank] if series.markers else None,
        markersize=4.5,
        linewidth=1.9 if rank == 0 else 1.4,
        drawstyle="steps-post" if chart.shape is Shape.STEP else "default",
        clip_on=False,
    )
    if series.low is not None and series.high is not None:
        axes.vlines(series.x, series.low, series.high, color=series.colour, linewidth=1)


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
