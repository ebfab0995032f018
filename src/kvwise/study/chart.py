"""A chart as a value: what is drawn, in which units; one writer makes plotly of it, another matplotlib."""

import math
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum

# One colour per framework on every chart; readable on white and on near-black.
COLOURS = {
    "full": "#8b93a7",
    "full+prefix": "#3e7bfa",
    "h2o": "#ee8a1d",
    "infinigen": "#12a67c",
    "streaming": "#a46cf2",
    "snapkv": "#e0526e",
    "topk": "#15a3c7",
    "random": "#a4abba",
    "window": "#717a8c",
}
SPARE = ("#b3a11a", "#d264c4", "#7a8f3c", "#9a6240", "#5f63d0", "#12a67c", "#e0526e", "#15a3c7", "#ee8a1d", "#a46cf2")
NEUTRAL = "#8b93a7"

LABEL_GAP = 0.062  # of the plot's height: labels at line ends are kept this far apart
PAD = 0.06  # room above and below the data, as a share of its range


class Shape(StrEnum):
    """How the points of a series are drawn."""

    LINE = "line"
    STEP = "step"
    BAR = "bar"


@dataclass(frozen=True, slots=True)
class Series:
    """One line or group of bars. `rank` tells the budgets of one framework apart: 0 is drawn boldest.

    `low` and `high` are the ends of error bars. A `guide` is what others are held against: thin and dashed. Of a
    series that is not `joined` only the points are drawn; `hollow`, `sizes` (marker diameters in pixels) and
    `captions` (words beside a point) are per point where they are given.
    """

    label: str
    colour: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    rank: int = 0
    markers: bool = True
    names: tuple[str, ...] = ()  # of the points, shown on hover
    guide: bool = False
    joined: bool = True
    hollow: tuple[bool, ...] = ()
    sizes: tuple[float, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal reference line with its words, which stand where lines begin or, `at_end`, where they end."""

    y: float
    text: str
    at_end: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart. `ticks` places words on the x axis; a bar chart has one bar per series.

    Charts of one `group` stand together inside their section, those that are `folded` where a reader must ask for them.
    """

    id: str
    section: str
    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    shape: Shape = Shape.LINE
    log_x: bool = False
    log_y: bool = False
    zero: bool = True  # the y axis starts at 0 (never on a log axis)
    top: float | None = None
    reverse_x: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    rules: tuple[Rule, ...] = ()
    group: str = ""
    folded: bool = False

    @property
    def heading(self) -> str:
        """The title with the group."""
        return f"{self.group}: {self.title}" if self.group else self.title

    @property
    def y_range(self) -> tuple[float, float]:
        """Range of the y axis; exponents of ten on a log axis."""
        values = [v for s in self.series for v in (*s.y, *(s.low or ()), *(s.high or ()))]
        values += [rule.y for rule in self.rules]
        if self.log_y:
            logs = [math.log10(v) for v in values if v > 0] or [0.0, 1.0]
            return _padded(min(logs), max(logs))
        low, high = _padded(0.0 if self.zero else min(values, default=0.0), max(values, default=1.0))
        return (0.0 if self.zero else low), (self.top if self.top is not None else high)

    @property
    def y_ticks(self) -> tuple[float, ...]:
        """Ticks of a logarithmic y axis: 1, 2, 5 steps, or only tens where these would crowd."""
        low, high = self.y_range
        return log_ticks(low, high) if self.log_y else ()

    @property
    def x_ticks(self) -> tuple[float, ...]:
        """Ticks of a logarithmic x axis."""
        values = [v for s in self.series for v in s.x if v > 0] or [1.0]
        return log_ticks(math.log10(min(values)), math.log10(max(values)))

    def end_labels(self) -> list[tuple[Series, float]]:
        """Each named series with the height of its label on the y axis (exponent on a log axis), none over another."""
        low, high = self.y_range
        ends = [(s, _scaled(s.y[-1], self.log_y, low)) for s in self.series if s.y and s.label]
        ends.sort(key=lambda pair: pair[1])
        heights = spread_out([height for _, height in ends], LABEL_GAP * (high - low), low, high)
        return [(s, height) for (s, _), height in zip(ends, heights, strict=True)]


def spread_out(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights moved as little as needed so that neighbours are `gap` apart, inside low..high if they fit."""
    out = list(heights)
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + gap)
    over = max(0.0, out[-1] - high) if out else 0.0
    for i in range(len(out) - 1, -1, -1):
        limit = high if i == len(out) - 1 else out[i + 1] - gap
        out[i] = min(out[i], limit) if over else out[i]
    return [max(h, low + i * gap) if out[0] < low else h for i, h in enumerate(out)]


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers between 10**low and 10**high: three to seven of them where there are so many."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = tuple(s * 10.0**d for d in decades for s in steps if low <= math.log10(s * 10.0**d) <= high)
        if len(ticks) >= 3:
            return ticks
    return ticks


def colours(frameworks: Sequence[str], together: Sequence[AbstractSet[str]] = ()) -> dict[str, str]:
    """A colour per framework: the known ones keep theirs, others take the spare one that is rarest around them.

    `together` are the sets that are drawn on one chart; without any, all are.
    """
    names = dict.fromkeys(frameworks)
    out = {name: COLOURS[name] for name in names if name in COLOURS}
    for name in names:
        if name not in out:
            around = {other for found in together or [set(names)] if name in found for other in found}
            used = Counter(colour for other, colour in out.items() if other in around)
            out[name] = min(SPARE, key=lambda colour: used[colour])
    return out


def _scaled(value: float, log: bool, low: float) -> float:
    if not log:
        return value
    return math.log10(value) if value > 0 else low


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * PAD or max(abs(high), 1.0) * PAD
    return low - room, high + room
