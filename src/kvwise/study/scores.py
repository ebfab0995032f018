"""Rows of answers -> figures of quality: accuracy per task, agreement with the full cache, and one score."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvwise.study import estimate
from kvwise.study.cells import REFERENCE
from kvwise.study.estimate import Estimate
from kvwise.study.who import Who, who_of

# A ratio to a full cache that hardly knows the answers itself says nothing about the method. Tasks with one right
# answer must be known by half; record sets give credit for parts, and good models stay below a half on some.
FLOOR, RECORD_FLOOR = 0.5, 0.1
AGREEMENT = "agreement"  # the task of models without tasks

Row = dict[str, Any]
Key = tuple[str, str]  # task, protocol


class Basis(StrEnum):
    """What a score is made of."""

    TASKS = "tasks"  # accuracy over the full cache's accuracy
    AGREEMENT = "agreement"  # the share of tokens on which the most likely one is the full cache's


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """How one strategy answered one task under one protocol, on one model and context length.

    `accuracy` is the share of right answers, or a record set's mean score; None where there is no right answer. `nll`
    is in nats per answer token, `kl` (of the full cache's distribution to the strategy's) in nats. Records are
    answered freely, so that they have neither `nll` nor agreement.
    """

    task: str
    protocol: str
    num_answers: int
    num_episodes: int
    accuracy: Estimate | None
    nll: Estimate | None
    top1: Estimate | None
    kl: Estimate | None


@dataclass(frozen=True, slots=True)
class Attested:
    """What the methods say that they did, over all requests of a cell.

    `dropped`, `merged` (dropped, but living on in others) and `kept` are shares of all tokens, of prompts and answers,
    in every layer and KV head that stores; `read` is the share that a selection fetched of what it could have
    fetched, None where there is none. `bits_per_element` of K and V when requests had settled; `freed` are bytes per
    token that went back to the pool then; `reused` is the share of tokens that others had computed.
    """

    kept: float
    dropped: float
    merged: float
    read: float | None
    reused: float
    bits_per_element: float
    freed: float


@dataclass(frozen=True, slots=True)
class QualityFigures:
    """What one strategy costs in answers on one model and context length.

    `score` is the mean over exact tasks and records of accuracy over the full cache's accuracy on the same episodes,
    so that the full cache's own is 1; without tasks it is `top1`, the share of answer tokens on which the most likely
    one is that of the full cache. It is None if the full cache was not measured or knows no task. `left_out` names
    the tasks that are in no score because the full cache answers too few of them. `attested` is None in rows that are
    older than it.
    """

    model: str
    context: int
    who: Who
    tasks: tuple[TaskFigures, ...]
    score: Estimate | None
    top1: Estimate | None
    kl: Estimate | None
    kv_bytes_per_token: dict[str, float]
    basis: str = Basis.TASKS
    left_out: tuple[str, ...] = ()
    attested: Attested | None = None


def quality_figures(answers: Iterable[Row], cells: Iterable[Row]) -> list[QualityFigures]:
    """Figures of every strategy on every model and context length, by model, context and strategy."""
    groups: dict[tuple[str, int], dict[Who, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in answers:
        groups[row["model"], row["context"]][who_of(row)].append(row)
    known = {cell["cell"]: cell for cell in cells}
    out = []
    for (model, context), by_who in sorted(groups.items()):
        full = next((_by_task(rows) for who, rows in by_who.items() if who.strategy == REFERENCE), {})
        for who, rows in sorted(by_who.items(), key=lambda item: item[0].order):
            out.append(_figures(model, context, who, _by_task(rows), full, known.get(rows[0]["cell"], {})))
    return out


def attested(cell: Row) -> Attested | None:
    """What the row of a quality cell attests; None in rows of older formats."""
    if not cell.get("num_heads") or not cell.get("tokens_seen"):
        return None
    places = cell["tokens_seen"] * cell["num_heads"]
    dropped, merged = cell["tokens_dropped"] / places, cell["tokens_merged"] / places
    return Attested(
        kept=1.0 - dropped - merged,
        dropped=dropped,
        merged=merged,
        read=cell["tokens_fetched"] / cell["fetch_candidates"] if cell["fetch_candidates"] else None,
        reused=(cell["tokens_reused"] or 0) / cell["tokens_seen"],
        bits_per_element=cell["bits_per_element"],
        freed=cell["bytes_freed"] / cell["tokens_seen"],
    )


def _figures(
    model: str, context: int, who: Who, mine: dict[Key, list[Row]], full: dict[Key, list[Row]], cell: Row
) -> QualityFigures:
    tasks = tuple(_task(*key, rows) for key, rows in mine.items())
    left_out = tuple(dict.fromkeys(task for (task, _), rows in full.items() if _graded(rows) and not _known(rows)))
    top1, kl = _average(tasks, lambda t: t.top1), _average(tasks, lambda t: t.kl)
    if any(t.task == AGREEMENT for t in tasks):
        score, basis = top1, Basis.AGREEMENT
    else:
        score, basis = _score(mine, full), Basis.TASKS
    if who.strategy == REFERENCE:  # what everything is measured by has no error against itself
        score, top1, kl = _exactly(score, 1.0), _exactly(top1, 1.0), _exactly(kl, 0.0)
    held = dict(cell.get("kv_bytes_per_token") or {})
    return QualityFigures(model, context, who, tasks, score, top1, kl, held, basis, left_out, attested(cell))


def _by_task(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Rows per task and protocol, each by episode and question."""
    out: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        out[row["task"], row["protocol"]].append(row)
    return {key: sorted(group, key=lambda r: (r["episode"], r["question"])) for key, group in out.items()}


def _task(task: str, protocol: str, rows: list[Row]) -> TaskFigures:
    accuracy = estimate.share(_grades(rows), _episodes(rows)) if _graded(rows) else None
    compared = [row for row in rows if row["kl_nats"] is not None]
    told = [row for row in rows if row["nll_nats"] is not None]
    top1, kl = (_top1(compared), _mean(compared, "kl_nats")) if compared else (None, None)
    if rows[0]["strategy"] == REFERENCE:
        top1, kl = _exactly(top1, 1.0), _exactly(kl, 0.0)
    return TaskFigures(
        task=task,
        protocol=protocol,
        num_answers=len(rows),
        num_episodes=len(set(_episodes(rows))),
        accuracy=accuracy,
        nll=_mean(told, "nll_nats") if told else None,
        top1=top1,
        kl=kl,
    )


def _mean(rows: Sequence[Row], name: str) -> Estimate:
    return estimate.mean([row[name] for row in rows], _episodes(rows))


def _top1(rows: Sequence[Row]) -> Estimate:
    tokens = sum(row["num_tokens"] for row in rows)
    return estimate.share([row["same_top1"] for row in rows], _episodes(rows), tokens)


def _score(mine: dict[Key, list[Row]], full: dict[Key, list[Row]]) -> Estimate | None:
    """Mean of accuracy over the full cache's, over the tasks that the full cache knows."""
    ratios: dict[str, list[Estimate]] = defaultdict(list)
    for key, rows in mine.items():
        if key in full and _known(full[key]) and _graded(rows):
            ratios[key[0]].append(estimate.ratio(_grades(rows), _grades(full[key]), _episodes(rows)))
    return estimate.average(list(ratios.values())) if ratios else None


def _average(tasks: Sequence[TaskFigures], of: Callable[[TaskFigures], Estimate | None]) -> Estimate | None:
    groups: dict[str, list[Estimate]] = defaultdict(list)
    for task in tasks:
        found = of(task)
        if found is not None:
            groups[task.task].append(found)
    return estimate.average(list(groups.values())) if groups else None


def _exactly(found: Estimate | None, value: float) -> Estimate | None:
    return None if found is None else Estimate(value, 0.0, found.count)


def _graded(rows: Sequence[Row]) -> bool:
    """Whether answers are right or wrong, or scored."""
    return rows[0]["right"] is not None or rows[0]["score"] is not None


def _grades(rows: Sequence[Row]) -> list[float]:
    return [float(row["right"] if row["right"] is not None else row["score"]) for row in rows]


def _known(full: Sequence[Row]) -> bool:
    """Whether the full cache answers enough of a task for others to be measured by it."""
    if not _graded(full):
        return False
    grades = _grades(full)
    return sum(grades) / len(grades) >= (FLOOR if full[0]["right"] is not None else RECORD_FLOOR)


def _episodes(rows: Sequence[Row]) -> list[int]:
    return [row["episode"] for row in rows]
