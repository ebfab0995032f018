"""Score against KV bytes per token: the front of all strategies, and where the others lie behind it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from kvwise.study.chart import NEUTRAL, SPARE, Chart, Rule, Series
from kvwise.study.names import labels, shared_note
from kvwise.study.palette import Palette, is_guide, short, slug
from kvwise.study.pareto import Bytes, Point, Standing, front_of, pareto
from kvwise.study.quality_looks import BARS, LABELS, bars, section_of, top
from kvwise.study.scores import Basis, QualityFigures
from kvwise.study.who import Who
from kvwise.study.words import budget as budget_text
from kvwise.study.words import size

FILLED = "filled: on the front by its value, nobody holds no more bytes and answers better; line: the front"
MARKER, GUIDE_MARKER = 7.0, 5.0  # diameters in pixels
AXES = {Bytes.DEVICE: "KV bytes per token on the device", Bytes.ALL: "KV bytes per token in all tiers"}


def bytes_charts(
    palette: Palette,
    here: Sequence[QualityFigures],
    everyone: Sequence[QualityFigures],
    rules: tuple[Rule, ...],
    parts: Mapping[str, Sequence[Who]] | None = None,
) -> Iterator[Chart]:
    """The score of `here` against the bytes on the device, with the front of `everyone`, one model and context length.

    With `parts`, one colour each instead of one per framework, the points of the front numbered as in the table, and
    a second chart of the bytes in all tiers, if they differ.
    """
    for count in Bytes if parts else (Bytes.DEVICE,):
        points = pareto(everyone, count)
        drawn = [p for p in points if p.quality in here]
        if len({p.num_bytes for p in drawn}) < 2 or (count is Bytes.ALL and not _outside(everyone)):
            continue
        series = _by_part(points, parts) if parts else _by_line(drawn, palette)
        first = here[0]
        name = "score" if first.basis == Basis.TASKS else "top-1"
        said = "" if count is Bytes.DEVICE else ", all tiers"
        yield Chart(
            id=slug("quality-bytes", *(["all-tiers"] if said else []), first.model, first.context),
            section=section_of(first.basis),
            title=f"{name} against memory{said}, {short(first.model)}, context {first.context}",
            note="; ".join(filter(None, _notes(drawn, count, bool(parts)))),
            x_label=AXES[count],
            y_label=LABELS[first.basis],
            series=(*_front_line(points), *series),
            top=top(first.basis),
            log_x=True,
            reverse_x=True,
            rules=rules,
        )


def _outside(here: Sequence[QualityFigures]) -> bool:
    return any(size for q in here for tier, size in q.kv_bytes_per_token.items() if tier != "device")


def _notes(points: Sequence[Point], count: Bytes, whole: bool) -> Iterator[str]:
    yield BARS
    yield FILLED
    if whole:
        yield "numbers: as in the table of the Pareto set"
        return
    yield shared_note([p.quality.who.framework for p in points])
    if count is Bytes.DEVICE:
        yield _host_note([p.quality for p in points])


def _front_line(points: Sequence[Point]) -> Iterator[Series]:
    """Steps: with so many bytes, that score can be had."""
    corners = [(p.num_bytes, p.score.value) for p in front_of(points)]
    if len(corners) > 1:
        # From many bytes to few: the score of a point holds until its bytes are too many, then the next one's does.
        steps = [corners[0], *(xy for a, b in pairwise(corners) for xy in ((a[0], b[1]), b))]
        yield Series("", NEUTRAL, tuple(x for x, _ in steps), tuple(y for _, y in steps), markers=False, guide=True)


def _by_line(points: Sequence[Point], palette: Palette) -> Iterator[Series]:
    """One series per line, from many bytes to few, with what tells its points apart beside them."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(palette.lines[point.quality.who.framework].name, []).append(point)
    names = labels(list(groups), [_framework(p) for p in points])
    for line in sorted(groups, key=lambda name: (not is_guide(name), name)):
        own = groups[line]
        option, _, _ = palette.lines[_framework(own[0])].level.rpartition(" ")
        levels = tuple(palette.lines[_framework(p)].level.rpartition(" ")[2] for p in own)
        yield replace(
            _series(own, names[line] + (f" ({option})" if option else ""), palette.colours[_framework(own[0])]),
            guide=is_guide(line),
            captions=levels if option else (),
        )


def _by_part(points: Sequence[Point], parts: Mapping[str, Sequence[Who]]) -> Iterator[Series]:
    """One series per part; whoever is in several belongs to the first."""
    left = list(points)
    numbers = {p.quality.who: str(n) for n, p in enumerate(front_of(points), start=1)}
    for colour, (name, members) in zip(SPARE * (1 + len(parts) // len(SPARE)), parts.items(), strict=False):
        own = [p for p in left if p.quality.who in members]
        left = [p for p in left if p not in own]
        if own:
            series = _series(own, name, colour)
            captions = tuple(numbers.get(p.quality.who, "") for p in own)
            yield replace(series, joined=False, captions=captions)


def _series(own: Sequence[Point], label: str, colour: str) -> Series:
    guide = is_guide(own[0].quality.who.framework)
    return Series(
        label,
        colour,
        tuple(p.num_bytes for p in own),
        tuple(p.score.value for p in own),
        **bars([p.score for p in own], bounded=own[0].quality.basis == Basis.AGREEMENT),
        names=tuple(map(_name, own)),
        hollow=tuple(p.standing is not Standing.ON for p in own),
        sizes=(GUIDE_MARKER if guide else MARKER,) * len(own),
    )


def _framework(point: Point) -> str:
    return point.quality.who.framework


def _name(point: Point) -> str:
    q = point.quality
    tiers = ", ".join(f"{size(v)} {tier}" for tier, v in sorted(q.kv_bytes_per_token.items()) if v)
    told = q.who.framework + ("" if q.who.budget is None else f", budget {budget_text(q.who.budget)}")
    return f"{tiers} ({told})"


def _host_note(here: Sequence[QualityFigures]) -> str:
    """What the axis leaves out: bytes that wait on other tiers."""
    held: dict[str, float] = {}
    for q in here:
        others = sum(v for tier, v in q.kv_bytes_per_token.items() if tier != "device")
        if others:
            held[q.who.framework] = max(held.get(q.who.framework, 0.0), others)
    told = ", ".join(f"{name} {size(value)}" for name, value in held.items())
    return f"not on this axis, per token on the host: {told}" if told else ""
