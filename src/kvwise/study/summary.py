"""Rows -> figures per condition and strategy: throughput, goodput, latencies, memory, quality, with intervals."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from kvwise.study import bootstrap
from kvwise.study.bootstrap import Interval
from kvwise.study.cells import CellKind
from kvwise.study.loading_figures import LoadingFigures, loading_figures
from kvwise.study.placement import placement_words
from kvwise.study.plan import Plan, Slo
from kvwise.study.record import StudyFolder
from kvwise.study.rows import Row, Status
from kvwise.study.scores import QualityFigures, TaskFigures, quality_figures
from kvwise.study.who import Who, who_of

__all__ = [
    "Condition",
    "Figures",
    "QualityFigures",
    "Study",
    "TaskFigures",
    "Who",
    "load_study",
    "summarize",
    "who_of",
]

PERCENTILES = (50.0, 90.0, 99.0)
UNFINISHED = ("cut", "not sent")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Condition:
    """Everything about a cell but its strategy and repeat: strategies are compared within one."""

    block: str
    model: str
    context: int
    memory: str
    concurrency: float  # inf: no limit
    rate: float  # inf: at once
    trace_times: bool = False
    tiers: str = ""
    throttles: str = ""  # links that are slowed down, on top of the plan's
    ttl_s: float = math.inf
    idle_ttl_s: float = math.inf

    @property
    def kept(self) -> tuple[float, float]:
        """How long KV is kept."""
        return self.ttl_s, self.idle_ttl_s

    @property
    def placed(self) -> str:
        """Tiers, links and times to live in words, each behind a comma; empty where all is as usual."""
        finite = [None if math.isinf(seconds) else seconds for seconds in self.kept]
        return "".join(f", {part}" for part in placement_words(self.tiers, self.throttles, *finite))

    def load_text(self) -> str:
        """The load in words."""
        at_once = "" if math.isinf(self.concurrency) else f"{self.concurrency:g} at a time"
        if self.trace_times:
            return "trace times" + (f", {at_once}" if at_once else "")
        if math.isinf(self.rate):
            return at_once or "all at once"
        return f"{self.rate:g} req/s" + (f", at most {at_once}" if at_once else "")


@dataclass(slots=True)
class Figures:
    """What one strategy did under one condition. Rates per second, times in seconds, sizes in bytes."""

    condition: Condition
    who: Who
    repeats: int
    num_requests: int
    num_finished: int
    num_cut: int
    goodput: Interval
    request_rate: Interval
    output_rate: Interval
    total_rate: Interval
    attainment: float  # share of all requests that met the service levels
    ttft: dict[float, Interval]
    tpot: dict[float, Interval]
    itl: dict[float, Interval]
    e2e: dict[float, Interval]
    peak_kv: dict[str, float]
    mean_kv: dict[str, float]
    pool_bytes: int
    hit_ratio: float | None
    preemptions: int
    links: dict[str, str]
    tier_shares: dict[str, float] = field(default_factory=dict)  # of the prompt tokens: found there; with tiers only
    tier_hit_ratio: dict[str, float] = field(default_factory=dict)  # of the blocks looked up there
    tier_faults: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)  # decision -> requests
    regret: float | None = None  # mean seconds of those requests, against the better fixed choice
    tokens_loaded: int = 0
    quality: QualityFigures | None = None  # of the nearest context length that was measured; it says which

    @property
    def rate_per_mib(self) -> float | None:
        """Output tokens per second for each MiB of KV held on the device, on average (the study's finding F5)."""
        held = self.mean_kv.get("device", 0.0)
        return self.output_rate.value / (held / 2**20) if held > 0 else None


@dataclass(slots=True)
class Study:
    """A study's rows with the plan they are of; figures are worked out once, when first asked for."""

    name: str
    plan: Plan
    cells: list[Row]
    requests: list[Row]
    samples: list[Row]
    answers: list[Row]
    onoff: list[Row]
    num_left: int = 0
    loads: list[Row] = field(default_factory=list)
    loading: list[LoadingFigures] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    qualities: list[QualityFigures] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """Cells that could not be measured."""
        return [row for row in self.cells if row["status"] == Status.FAILED]

    @property
    def links(self) -> dict[str, str]:
        """Throttled links with their label."""
        told = {name: text for row in self.cells for name, text in (row["links"] or {}).items()}
        labels = {name: told.get(name, f"{speed} (throttled)") for name, speed in self.plan.links.items()}
        out = {name: text.removeprefix(name).strip() for name, text in labels.items()}
        for block in self.plan.block:
            for name in dict.fromkeys(name for links in block.links for name in links):
                speeds = " and ".join(links[name] for links in block.links if name in links)
                out.setdefault(name, f"throttled to {speeds} in block {block.name}")
        return out


def load_study(folder: StudyFolder, plan: Plan, num_left: int = 0) -> Study:
    """Read a study's rows and work out its figures."""
    tables = {name: folder.rows(name) for name in ("cells", "requests", "samples", "answers", "onoff", "loads")}
    study = Study(
        plan.name,
        plan,
        cells=tables["cells"],
        requests=tables["requests"],
        samples=tables["samples"],
        answers=tables["answers"],
        onoff=tables["onoff"],
        num_left=num_left,
        loads=tables["loads"],
    )
    summarize(study)
    return study


def summarize(study: Study) -> None:
    """Fill in `figures`, `qualities` and `loading` from the rows."""
    study.loading = loading_figures(study.loads)
    study.qualities = quality_figures(study.answers, study.cells)
    requests = _by_cell(study.requests)
    groups: dict[tuple[Condition, Who], list[Row]] = defaultdict(list)
    for row in study.cells:
        if row["kind"] == CellKind.LIVE and row["status"] == Status.DONE:
            groups[condition_of(row), who_of(row)].append(row)
    study.figures = []
    for (condition, who), cells in sorted(groups.items(), key=lambda item: _place(study.plan, *item[0])):
        figures = _figures(condition, who, cells, [requests[c["cell"]] for c in cells], study.plan)
        figures.quality = _nearest(study.qualities, condition, who)
        study.figures.append(figures)


def _place(plan: Plan, condition: Condition, who: Who) -> tuple[object, ...]:
    """Sorts as the plan does: blocks and models in its order, then from small to large."""
    index, block = next((i, block) for i, block in enumerate(plan.block) if block.name == condition.block)
    models, memory = block.models, block.memory
    places = [(p.tiers_text, p.links_text) for p in block.placements]
    place = places.index((condition.tiers, condition.throttles)), *condition.kept
    load = (condition.context, memory.index(condition.memory), *place, condition.concurrency, condition.rate)
    return index, models.index(condition.model), *load, who.order


def condition_of(row: Row) -> Condition:
    """The condition of a cell's row."""
    rate, concurrency = row["request_rate"], row["concurrency"]
    return Condition(
        block=row["block"],
        model=row["model"],
        context=row["context"],
        memory=row["memory"],
        concurrency=math.inf if concurrency is None else concurrency,
        rate=math.inf if rate is None else rate,
        trace_times=rate is None,
        tiers=row["tiers"] or "",
        throttles=row["throttles"] or "",
        ttl_s=math.inf if row["ttl_s"] is None else row["ttl_s"],
        idle_ttl_s=math.inf if row["idle_ttl_s"] is None else row["idle_ttl_s"],
    )


def _nearest(qualities: Sequence[QualityFigures], condition: Condition, who: Who) -> QualityFigures | None:
    """Quality of a strategy at the context length nearest to the condition's (a trace brings its own: the least)."""
    mine = (q for q in qualities if (q.model, q.who.strategy) == (condition.model, who.strategy))
    return min(mine, key=lambda q: abs(q.context - condition.context), default=None)


def meets(row: Row, slo: Slo) -> bool:
    """Whether a request finished and met every service level that is given."""
    if row["e2e_s"] is None:
        return False
    pairs = ((row["ttft_s"], slo.ttft_ms), (row["tpot_s"], slo.tpot_ms), (row["e2e_s"], slo.e2e_ms))
    return all(limit is None or value is None or value * 1000 <= limit for value, limit in pairs)


def _by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        out[row["cell"]].append(row)
    return out


def _figures(condition: Condition, who: Who, cells: list[Row], requests: list[list[Row]], plan: Plan) -> Figures:
    """Figures over the repeats of one strategy under one condition."""
    seconds = [cell["duration_s"] for cell in cells]
    good = [_column(rows, lambda r: meets(r, plan.slo)) for rows in requests]
    outputs = [_column(rows, lambda r: r["output_tokens"]) for rows in requests]
    inputs = [_column(rows, lambda r: r["prompt_tokens"] * (r["e2e_s"] is not None)) for rows in requests]
    total = [i + o for i, o in zip(inputs, outputs, strict=True)]

    def per_second(groups: list[Array]) -> Interval:
        return bootstrap.rate(groups, seconds, plan.seed)

    def spread(name: str) -> dict[float, Interval]:
        return bootstrap.percentiles([_times(rows, name) for rows in bounded], PERCENTILES, plan.seed)

    bounded = [_with_bounds(rows, length) for rows, length in zip(requests, seconds, strict=True)]
    queried = _sum(cells, "prefix_queries")
    return Figures(
        condition=condition,
        who=who,
        repeats=len(cells),
        num_requests=_sum(cells, "num_requests"),
        num_finished=_sum(cells, "num_finished"),
        num_cut=sum(r["finish_reason"] in UNFINISHED for rows in requests for r in rows),
        goodput=per_second(good),
        request_rate=per_second([_column(rows, lambda r: r["e2e_s"] is not None) for rows in requests]),
        output_rate=per_second(outputs),
        total_rate=per_second(total),
        attainment=float(sum(g.sum() for g in good)) / _sum(cells, "num_requests"),
        ttft=spread("ttft_s"),
        tpot=spread("tpot_s"),
        itl=bootstrap.percentiles([_gaps(rows) for rows in requests], PERCENTILES, plan.seed),
        e2e=spread("e2e_s"),
        peak_kv=_per_tier(cells, "peak_kv_bytes", max),
        mean_kv=_per_tier(cells, "mean_kv_bytes", fmean),
        pool_bytes=max(cell["pool_bytes"] or 0 for cell in cells),
        hit_ratio=_sum(cells, "prefix_hits") / queried if queried else None,
        preemptions=_sum(cells, "num_preemptions"),
        links={name: text for cell in cells for name, text in (cell["links"] or {}).items()},
        tier_shares=_per_tier(cells, "tier_token_share", fmean),
        tier_hit_ratio=_per_tier(cells, "tier_hit_ratio", fmean),
        tier_faults={tier: round(count) for tier, count in _per_tier(cells, "tier_faults", sum).items()},
        loads={name: round(count) for name, count in _per_tier(cells, "loads", sum).items()},
        regret=_mean(cells, "mean_regret_s"),
        tokens_loaded=_sum(cells, "tokens_loaded"),
    )


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return fmean(known) if known else None


def _with_bounds(rows: Sequence[Row], duration: float) -> list[Row]:
    """Requests with what is known of the cut ones: they waited at least until the cell ended.

    Leaving them out would flatter the strategy that finished least.
    """
    out = []
    for row in rows:
        if row["finish_reason"] == "cut" and row["arrival_s"] is not None:
            waited = duration - row["arrival_s"]
            row = row | {"e2e_s": waited, "ttft_s": waited if row["ttft_s"] is None else row["ttft_s"]}
        out.append(row)
    return out


def _column(rows: Sequence[Row], value: Callable[[Row], float | bool]) -> Array:
    return np.array([float(value(row)) for row in rows])


def _times(rows: Sequence[Row], name: str) -> Array:
    return np.array([row[name] for row in rows if row[name] is not None], dtype=float)


def _gaps(rows: Sequence[Row]) -> Array:
    return np.concatenate([np.array(row["itl_s"] or [], dtype=float) for row in rows])


def _sum(rows: Sequence[Row], name: str) -> int:
    return int(sum(row[name] or 0 for row in rows))


def _per_tier(rows: Sequence[Row], name: str, combine: Callable[[list[float]], float]) -> dict[str, float]:
    tiers: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for tier, value in (row[name] or {}).items():
            tiers[tier].append(float(value))
    return {tier: combine(values) for tier, values in sorted(tiers.items())}
