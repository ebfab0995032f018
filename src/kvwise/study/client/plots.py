"""Draws a run: how TTFT and ITL are distributed, and tokens per second over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvwise.core.errors import UsageError
from kvwise.study.chart import COLOURS, Chart, Rule, Series, Shape
from kvwise.study.client.answer import Answer
from kvwise.study.client.figures import tokens_per_second
from kvwise.study.png import write_png

_COLOUR = COLOURS["full+prefix"]
_MOST_POINTS = 2000


def draw_run(answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Write `ttft.png`, `itl.png` and `throughput.png`; those without data are left out. UsageError if it cannot."""
    done = [a for a in answers if a.ok]
    charts = [
        distribution("ttft", "Time to first token", [a.ttft for a in done]),
        distribution("itl", "Time between tokens", [itl for a in done for itl in a.itls]),
        throughput(done),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{chart.id}.png" for chart in charts if chart is not None]
        for chart, path in zip(filter(None, charts), paths, strict=True):
            write_png(chart, path)
    except OSError as error:
        raise UsageError(f"--plot {folder}: {error.strerror or error}") from error
    return paths


def distribution(name: str, title: str, seconds: Sequence[float]) -> Chart | None:
    """The share of values up to each, with the median and the 99th percentile marked."""
    if not len(seconds):
        return None
    values = np.sort(np.asarray(seconds)) * 1e3
    shares = np.arange(1, len(values) + 1) / len(values)
    if len(values) > _MOST_POINTS:
        places = np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int)
        values, shares = values[places], shares[places]
    rules = tuple(Rule(p / 100, f"p{p}: {np.percentile(seconds, p) * 1e3:.3g} ms", at_end=True) for p in (50, 99))
    line = Series("", _COLOUR, tuple(values.tolist()), tuple(shares.tolist()), markers=False)
    return Chart(
        name, "Load", title, f"{len(seconds)} values of requests that completed", "milliseconds", "share of values",
        (line,), Shape.STEP, top=1.0, rules=rules,
    )  # fmt: skip


def throughput(done: Sequence[Answer]) -> Chart | None:
    """Tokens in each second."""
    counts = tokens_per_second(done)
    if not counts:
        return None
    # A step holds from its own second to the next: the last one needs an end.
    line = Series("", _COLOUR, tuple(map(float, range(len(counts) + 1))), (*counts, counts[-1]), markers=False)
    note = "chunks with tokens, by the second in which they came; of requests that completed"
    return Chart(
        "throughput", "Load", "Output tokens over time", note, "seconds from the first request",
        "tokens per second", (line,), Shape.STEP,
    )  # fmt: skip
