"""Draws how a training went: accuracy of every kind of row against tokens, with the loss below."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, SOFT, FAINT = "#1d2330", "#5b6475", "#d9dde6"
# Okabe and Ito's colours, told apart by colour-blind readers too; the last one is drawn dashed.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#5b6475")
WORDS = {"multi_value": "multi-value", "repeat": "repeated text"}
SMOOTH = 5  # notes that one point of the loss is the geometric mean of


def write_curve(history: Sequence[dict[str, Any]], kinds: Sequence[str], title: str, note: str, path: Path) -> None:
    """Draw the notes of a training (`State.history`) into the PNG `path`."""
    figure = Figure(figsize=(8.0, 5.0), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.975, title, fontsize=11, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 0.925, note, fontsize=7.5, color=SOFT, va="top")
    upper = figure.add_axes((0.085, 0.37, 0.70, 0.5))
    lower = figure.add_axes((0.085, 0.1, 0.70, 0.21), sharex=upper)
    _accuracies(upper, history, kinds)
    _loss(lower, history)
    for axes in (upper, lower):
        _stages(axes, history, named=axes is upper)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.tick_params(which="both", labelsize=8, colors=SOFT, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
    figure.savefig(path)


def _accuracies(axes: Axes, history: Sequence[dict[str, Any]], kinds: Sequence[str]) -> None:
    for i, kind in enumerate(kinds):
        x = [row["tokens"] / 1e6 for row in history if kind in row]
        y = [row[kind] for row in history if kind in row]
        label = f"{WORDS.get(kind, kind)}  {y[-1]:.2f}" if y else WORDS.get(kind, kind)
        style = "--" if kind == "repeat" else "-"
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], linewidth=1.5, label=label)
    axes.set_ylim(-0.02, 1.04)
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("answer tokens right", fontsize=8, color=SOFT)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        title="at the end",
        title_fontsize=8,
        alignment="left",
    )


def _loss(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    losses = np.array([row["loss"] for row in history])
    x = np.array([row["tokens"] / 1e6 for row in history])
    axes.plot(x, losses, color=FAINT, linewidth=0.8)
    if len(losses) >= SMOOTH:
        means = np.exp(np.convolve(np.log(losses), np.full(SMOOTH, 1 / SMOOTH), "valid"))
        half = SMOOTH // 2
        axes.plot(x[half:-half], means, color=INK, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylabel("loss of answers\n(nats)", fontsize=8, color=SOFT)
    axes.set_xlabel("million tokens", fontsize=8, color=SOFT)


def _stages(axes: Axes, history: Sequence[dict[str, Any]], *, named: bool) -> None:
    """A vertical line where the contexts become longer."""
    before = None
    for row in history:
        if row["length"] == before:
            continue
        x, before = row["tokens"] / 1e6, row["length"]
        axes.axvline(x, color=SOFT, linewidth=0.7, linestyle=(0, (1, 2)))
        if named:
            name = f" T = {before}"
            axes.text(x, 0.35, name, rotation=90, fontsize=7, color=SOFT, ha="left", va="center")
