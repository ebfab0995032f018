"""One colour per framework and one line style per budget, the same on every chart of a study.

Frameworks that differ in the number of one option are one line, and share its colour.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from kvwise.study.cells import CellKind
from kvwise.study.chart import Series, colours
from kvwise.study.groups import groups
from kvwise.study.names import lines
from kvwise.study.summary import Figures, Study, Who, who_of

GUIDES = ("random", "window")


class Palette:
    """Colours and ranks of the strategies of a study."""

    def __init__(self, study: Study) -> None:
        whos = {who_of(row) for row in study.cells if row["kind"] not in (CellKind.ONOFF, CellKind.LOADING)}
        ordered = sorted(whos, key=lambda who: who.order)
        self.lines = lines([who.framework for who in ordered])
        own = {name: line.name for name, line in self.lines.items()}
        together = [{own[w.framework] for w in members} for members in groups(study.plan, ordered).values()]
        paint = colours(list(own.values()), together)
        self.colours = {name: paint[line] for name, line in own.items()}
        budgets: dict[str, list[float]] = defaultdict(list)
        for who in ordered:
            budgets[who.framework].append(who.budget or 1.0)
        self._ranks = {who: budgets[who.framework].index(who.budget or 1.0) for who in ordered}

    def series(
        self, who: Who, points: Sequence[tuple[float, float]], *, markers: bool = True, names: Sequence[str] = ()
    ) -> Series:
        """A series in the strategy's colour and style."""
        return Series(
            who.label,
            self.colours[who.framework],
            tuple(x for x, _ in points),
            tuple(y for _, y in points),
            rank=self._ranks[who],
            markers=markers,
            names=tuple(names),
            guide=is_guide(who.framework),
        )

    def rank(self, who: Who) -> int:
        """0 for the largest budget of a framework, then 1, 2, ..."""
        return self._ranks[who]


def method(framework: str) -> str:
    """The first method's name of a framework: `h2o` of `h2o(normalised=true)+prefix`."""
    return re.split(r"[(+]", framework, maxsplit=1)[0]


def plain(framework: str) -> str:
    """A framework's name as a label: `h2o normalised` for `h2o(normalised=true)`."""
    return re.sub(r"=true\b", "", framework).replace("(", " ").replace(")", "")


def is_guide(framework: str) -> bool:
    """Whether a framework decides without looking at anything: whatever looks should do better."""
    return method(framework) in GUIDES


def slug(*parts: object) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def short(model: str) -> str:
    """A model's name without its folder."""
    return model.removeprefix("random:").rstrip("/").rsplit("/", 1)[-1]


def by_strategy(figures: Sequence[Figures]) -> dict[Who, list[Figures]]:
    """Figures of each strategy, frameworks by name and budgets from large to small."""
    out: dict[Who, list[Figures]] = defaultdict(list)
    for f in sorted(figures, key=lambda f: f.who.order):
        out[f.who].append(f)
    return out


def by_block(study: Study) -> dict[tuple[str, str], list[Figures]]:
    """Figures of each (block, model), in the plan's order."""
    out: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    for f in study.figures:
        out[f.condition.block, f.condition.model].append(f)
    return out
