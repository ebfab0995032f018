"""The Pareto set in words, as a table of the page, and as JSON values."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from kvwise.study import words
from kvwise.study.markup import table, who
from kvwise.study.palette import short
from kvwise.study.pareto import Bytes, Point, Standing, front_of, pareto
from kvwise.study.scores import Attested, QualityFigures
from kvwise.study.who import Who

HEADING = "Pareto set"
ATTESTED = (
    " Attested by the engine: kept, dropped and merged are shares of all tokens in all layers and heads that store; "
    "read is the share of what could be fetched, reused that of tokens that another request had computed."
)


def by_place(here: Sequence[QualityFigures]) -> dict[tuple[str, str, int], list[QualityFigures]]:
    """Figures by (basis, model, context length): points are compared within one."""
    out: dict[tuple[str, str, int], list[QualityFigures]] = {}
    for q in here:
        out.setdefault((q.basis, q.model, q.context), []).append(q)
    return out


def sentences(here: Sequence[QualityFigures]) -> Iterator[str]:
    """Who is on the front, by bytes on the device and in all tiers; nothing where there is no choice."""
    places = by_place(here)
    for (_, model, context), everyone in places.items():
        where = "" if len(places) == 1 else f"{short(model)}, context {context}, "
        for count in _counts(everyone):
            points = pareto(everyone, count)
            front = front_of(points)
            within = [p for p in points if p.standing is Standing.WITHIN]
            told = ", ".join(
                f"{p.quality.who.label} ({words.size(p.num_bytes)}, {words.estimate(p.score)})" for p in front
            )
            yield (
                f"{where}score against bytes per token {count}: {len(front)} of {len(points)} strategies are on the "
                f"front, from many bytes to few: {told}"
            )
            if within:
                yield (
                    f"{where}{count}, not told apart from the front: {len(within)} more, which nobody with no more "
                    "bytes beats beyond the error: " + ", ".join(p.quality.who.label for p in within)
                )


def pareto_section(everyone: Sequence[QualityFigures], paint: Mapping[str, str]) -> str:
    """The table of all strategies of one model and context length; empty where there is no choice."""
    counts = _counts(everyone)
    if not counts:
        return ""
    found = {count: {p.quality.who: p for p in pareto(everyone, count)} for count in counts}
    numbers = {
        c: {p.quality.who: n for n, p in enumerate(front_of(list(f.values())), start=1)} for c, f in found.items()
    }
    head = ["Strategy", "score"]
    for count in counts:
        head += [f"KV per token\n{count}", f"on the front\n{count}"]
    attested = any(q.attested is not None for q in everyone)
    head += ["kept", "dropped", "merged", "read", "reused", "bits per\nelement", "freed\nper token"] if attested else []
    order = sorted(everyone, key=lambda q: _place(found[counts[0]], q))
    rows = []
    for q in order:
        row = [who(q.who, dict(paint)), words.estimate(q.score)]
        for count in counts:
            row += _standing(found[count].get(q.who), numbers[count])
        rows.append(row + (_attested(q.attested) if attested else []))
    numeric = [i for i, name in enumerate(head) if i and not name.startswith("on the front")]
    note = (
        '<p class="soft small">On the front: <b>number</b>, by its value nobody holds no more bytes and answers better '
        "(numbered from many bytes to few); <i>within the error</i>, somebody does, but not by more than 1.96 combined "
        "standard errors; <i>no</i>: the number of who does. Bytes that differ by less than 1 % count as equal."
        f"{ATTESTED if attested else ''}</p>"
    )
    return table(head, rows, numeric=numeric, keep_first=True) + note


def pareto_values(here: Sequence[QualityFigures]) -> list[dict[str, Any]]:
    """Every strategy's standing as JSON values."""
    return [
        {
            "model": model,
            "context": context,
            "bytes": str(count),
            "strategy": p.quality.who.strategy,
            "bytes_per_token": p.num_bytes,
            "score": p.score.value,
            "error": p.score.error,
            "on_the_front": str(p.standing),
            "beaten_by": None if p.beaten_by is None else p.beaten_by.who.strategy,
        }
        for (_, model, context), everyone in by_place(here).items()
        for count in _counts(everyone)
        for p in pareto(everyone, count)
    ]


def _counts(everyone: Sequence[QualityFigures]) -> list[Bytes]:
    """Which bytes can be told apart: on the device, and in all tiers where some lie elsewhere."""
    points = pareto(everyone, Bytes.DEVICE)
    if len({p.num_bytes for p in points}) < 2:
        return []
    outside = any(v for q in everyone for tier, v in q.kv_bytes_per_token.items() if tier != "device")
    return [Bytes.DEVICE, Bytes.ALL] if outside else [Bytes.DEVICE]


def _place(found: Mapping[Any, Point], q: QualityFigures) -> float:
    return -found[q.who].num_bytes if q.who in found else 0.0


def _standing(point: Point | None, numbers: Mapping[Who, int]) -> list[str]:
    if point is None:
        return ["–", "–"]
    size, who_it_is = words.size(point.num_bytes), point.quality.who
    if who_it_is in numbers:
        return [size, f"<b>{numbers[who_it_is]}</b>"]
    if point.beaten_by is None:
        return [size, f"<i>{Standing.WITHIN}</i>"]
    better = point.beaten_by.who
    return [size, f'<span class="soft">no: {escape(str(numbers.get(better, better.label)))}</span>']


def _attested(told: Attested | None) -> list[str]:
    if told is None:
        return ["–"] * 7
    shares = [told.kept, told.dropped, told.merged, told.read, told.reused]
    shown = ["–" if value is None or (i and not value) else words.share(value) for i, value in enumerate(shares)]
    return [*shown, words.number(told.bits_per_element), words.size(told.freed) if told.freed else "–"]
