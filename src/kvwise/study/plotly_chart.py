"""Draws a chart with plotly: data and layout as plain values, colours of axes and text left to the page's theme."""

from typing import Any

import plotly.graph_objects as go

from kvwise.study.chart import Chart, Series, Shape
from kvwise.study.words import number

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
HEIGHT = 340
GUIDE_DASH = "6px,4px"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def plotly_chart(chart: Chart) -> dict[str, Any]:
    """`data` and `layout` for Plotly.newPlot."""
    data = _bars(chart) if chart.shape is Shape.BAR else [_trace(s, chart) for s in chart.series if s.x]
    figure = go.Figure(data=data, layout=_layout(chart))
    plain: dict[str, Any] = figure.to_plotly_json()
    plain["layout"].pop("template", None)
    return plain


def _trace(series: Series, chart: Chart) -> dict[str, Any]:
    rank = min(series.rank, len(DASHES) - 1)
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": _mode(series),
        "name": series.label,
        "x": list(series.x),
        "y": list(series.y),
        "line": {"color": series.colour, "width": 2.4 if rank == 0 else 1.8, "dash": DASHES[rank]},
        "marker": _marker(series, rank),
        "opacity": 1.0 if rank == 0 else 0.92,
        "cliponaxis": False,
    }
    trace |= {"hovertemplate": _hover(series, chart)} if series.label else {"hoverinfo": "skip"}
    if series.guide:
        trace["line"] |= {"width": 1.5, "dash": GUIDE_DASH}
    if chart.shape is Shape.STEP:
        trace["line"]["shape"] = "hv"
    if series.names or chart.ticks:
        words = dict(chart.ticks)
        trace["customdata"] = list(series.names) or [words.get(x, f"{x:g}") for x in series.x]
    if series.captions:
        trace |= {"text": list(series.captions), "textposition": "bottom center"}
        trace["textfont"] = {"size": 10, "color": series.colour}
    if series.low is not None and series.high is not None:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [h - y for h, y in zip(series.high, series.y, strict=True)],
            "arrayminus": [y - v for v, y in zip(series.low, series.y, strict=True)],
            "thickness": 1.1,
            "width": 3,
            "color": series.colour,
        }
    return trace


def _mode(series: Series) -> str:
    parts = {"lines": series.joined, "markers": series.markers, "text": bool(series.captions)}
    return "+".join(name for name, wanted in parts.items() if wanted)


def _marker(series: Series, rank: int) -> dict[str, Any]:
    symbol = SYMBOLS[rank]
    return {
        "symbol": [f"{symbol}-open" if hollow else symbol for hollow in series.hollow] or symbol,
        "size": list(series.sizes) or (5 if series.guide else 7),
        "color": series.colour,
        "opacity": 1.0,  # also where sizes differ: plotly would make those see-through
        "line": {"color": series.colour, "width": 1.6 if series.hollow else 0},
    }


def _hover(series: Series, chart: Chart) -> str:
    x = "%{customdata}" if series.names or chart.ticks else "%{x:.4g}"
    return f"<b>{series.label}</b><br>{chart.x_label}: {x}<br>{chart.y_label}: %{{y:.4g}}<extra></extra>"


def _bars(chart: Chart) -> list[dict[str, Any]]:
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": s.label,
            "x": list(s.y),
            "y": [s.label],
            "marker": {"color": s.colour, "opacity": 1.0 - 0.22 * min(s.rank, 3)},
            "text": [number(s.y[0])],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": f"<b>{s.label}</b><br>%{{x:.4g}} {chart.x_label}<extra></extra>",
        }
        for s in chart.series
    ]


def _layout(chart: Chart) -> dict[str, Any]:
    bar = chart.shape is Shape.BAR
    layout: dict[str, Any] = {
        "height": HEIGHT,
        "margin": {"l": 104 if bar else 54, "r": 40 if bar else _margin(chart), "t": 10, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
        "font": {"family": FONT, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _x_axis(chart),
        "yaxis": {"automargin": False, "ticklen": 4} if bar else _y_axis(chart),
    }
    if bar:
        layout["bargap"] = 0.35
        return layout
    layout["annotations"] = [_label(s, height) for s, height in chart.end_labels()]
    for rule in chart.rules:
        layout.setdefault("shapes", []).append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": rule.y, "y1": rule.y, "line": {"dash": "dot"}}
        )
        layout["annotations"].append(
            {"x": int(rule.at_end), "xref": "paper", "y": rule.y, "text": rule.text, "yanchor": "bottom",
             "xanchor": "right" if rule.at_end else "left", "showarrow": False, "font": {"size": 11}}
        )  # fmt: skip
    return layout


def _margin(chart: Chart) -> int:
    """Pixels on the right for the longest name there."""
    return min(200, max(100, 14 + round(6.4 * max((len(s.label) for s in chart.series), default=0))))


def _x_axis(chart: Chart) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": chart.x_label, "standoff": 8}, "zeroline": False, "ticklen": 4}
    if chart.shape is Shape.BAR:
        longest = max((s.y[0] for s in chart.series), default=1.0)
        return axis | {"range": [0, longest * 1.15]}
    if chart.log_x:
        axis |= {"type": "log", "tickvals": list(chart.x_ticks), "ticktext": [number(v) for v in chart.x_ticks]}
    if chart.reverse_x:
        axis["autorange"] = "reversed"
    if chart.ticks:
        axis |= {"tickvals": [x for x, _ in chart.ticks], "ticktext": [text for _, text in chart.ticks]}
        axis["range"] = [chart.ticks[0][0] - 0.15, chart.ticks[-1][0] + 0.08]
    return axis


def _y_axis(chart: Chart) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "title": {"text": chart.y_label, "standoff": 6},
        "range": list(chart.y_range),
        "zeroline": False,
        "nticks": 6,
    }
    if chart.log_y:
        axis |= {"type": "log", "tickvals": list(chart.y_ticks), "ticktext": [number(v) for v in chart.y_ticks]}
    return axis


def _label(series: Series, height: float) -> dict[str, Any]:
    return {
        "x": 1.0,
        "xref": "paper",
        "xshift": 6,
        "y": height,
        "text": series.label,
        "xanchor": "left",
        "yanchor": "middle",
        "showarrow": False,
        "font": {"color": series.colour, "size": 11},
    }
