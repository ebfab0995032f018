"""Rows of loading cells -> figures: the time to the first token of each method at each place, and what was possible."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kvwise.study.loading_section import COMPUTE, LOAD
from kvwise.study.rows import Row

SLACK = 1.10  # what counts as near the optimum, beside one chunk
CAKE = "cake"


@dataclass(frozen=True, slots=True)
class Place:
    """Where methods are compared. `bandwidth` is as the plan writes it."""

    block: str
    model: str
    context: int
    share: float
    bandwidth: str
    num_others: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: median, least and most over the runs."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Method:
    """What one method did at a place: times, prefix tokens it loaded (share), its decisions, mean regret in seconds."""

    name: str
    ttft: Timing
    all_first: Timing
    loaded: float
    decisions: dict[str, int]
    regret: float | None

    @property
    def is_cake(self) -> bool:
        """Whether it computes and loads at once, as Cake does."""
        return self.name.partition("(")[0] == CAKE


@dataclass(frozen=True, slots=True)
class LoadingFigures:
    """All methods at one place. Times in seconds.

    `optimum` is Tc*Tl / (Tc+Tl) of the times that computing and loading took in the same run, the least time in which
    both sides together can be done (CacheFlow, arXiv 2604.25080); None where plain loading was not measured.
    """

    place: Place
    bytes_per_s: float
    break_even: float
    methods: dict[str, Method]
    optimum: Timing | None
    chunk_s: float
    runs: dict[str, list[float]]
    all_runs: dict[str, list[float]]

    def speedup(self, method: str, over: str, *, whole: bool = False) -> float | None:
        """How many times sooner than `over` the first token comes (`whole`: those of all requests); median of runs."""
        runs = self.all_runs if whole else self.runs
        if method not in runs or over not in runs:
            return None
        return median(theirs / ours for ours, theirs in zip(runs[method], runs[over], strict=True))

    def over_optimum(self, method: str) -> float | None:
        """Its time over the optimum of the same run; median of runs."""
        if LOAD not in self.runs:
            return None
        pairs = zip(self.runs[method], optima(self.runs), strict=True)
        return median(ours / best for ours, best in pairs)

    def near_optimum(self, method: str) -> bool:
        """Whether it takes at most 1.10 optima and one chunk."""
        return self.optimum is not None and self.methods[method].ttft.value <= SLACK * self.optimum.value + self.chunk_s

    def near_better(self, method: str) -> bool:
        """Whether it takes at most one chunk longer than the better of computing and loading."""
        better = min(self.methods[name].ttft.value for name in (COMPUTE, LOAD) if name in self.methods)
        return self.methods[method].ttft.value <= better + self.chunk_s


def optima(runs: Mapping[str, Sequence[float]]) -> list[float]:
    """Tc*Tl / (Tc+Tl) of each run."""
    pairs = zip(runs[COMPUTE], runs[LOAD], strict=True)
    return [compute * load / (compute + load) for compute, load in pairs]


@dataclass(frozen=True, slots=True)
class Mean:
    """Means over places of a method's speed-ups against loading and computing only; `num` places, `losing` below 1."""

    over_load: float
    over_compute: float
    num: int
    losing: int


def loading_figures(rows: Sequence[Row]) -> list[LoadingFigures]:
    """The figures of every place, in the order of the rows, bandwidths from slow to fast."""
    groups: dict[Place, list[Row]] = defaultdict(list)
    for row in rows:
        share = row["compute_share"] or 1.0
        place = Place(row["block"], row["model"], row["context"], share, row["bandwidth"], row["num_others"])
        groups[place].append(row)
    found = [_figures(place, group) for place, group in groups.items()]
    return sorted(found, key=lambda f: (f.place.block, f.place.model, f.place.context, f.place.share, f.bytes_per_s))


def _figures(place: Place, rows: Sequence[Row]) -> LoadingFigures:
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["run"]):
        by_method[row["method"]].append(row)
    runs = {name: [row["ttft_s"] for row in some] for name, some in by_method.items()}
    ours = next((some for name, some in by_method.items() if name.partition("(")[0] == CAKE), rows)
    return LoadingFigures(
        place=place,
        bytes_per_s=median(row["bytes_per_s"] for row in rows),
        break_even=median(row["break_even_bytes_per_s"] for row in rows),
        methods={name: _method(name, some) for name, some in by_method.items()},
        optimum=_timing(optima(runs)) if LOAD in runs else None,
        chunk_s=median(row["chunk_s"] for row in ours),
        runs=runs,
        all_runs={name: [row["all_first_s"] for row in some] for name, some in by_method.items()},
    )


def _method(name: str, rows: Sequence[Row]) -> Method:
    regrets = [row["regret_s"] for row in rows if row["regret_s"] is not None]
    tokens = sum(row["tokens_loaded"] + row["tokens_computed"] for row in rows)
    return Method(
        name=name,
        ttft=_timing([row["ttft_s"] for row in rows]),
        all_first=_timing([row["all_first_s"] for row in rows]),
        loaded=sum(row["tokens_loaded"] for row in rows) / tokens if tokens else 0.0,
        decisions=dict(Counter(row["decision"] for row in rows if row["decision"] is not None)),
        regret=fmean(regrets) if regrets else None,
    )


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(median(seconds), min(seconds), max(seconds))


def cake_of(figures: LoadingFigures) -> str | None:
    """The name of the Cake that was measured there, with its options; None: none was."""
    return next((name for name, method in figures.methods.items() if method.is_cake), None)


def mean_speedups(
    figures: Sequence[LoadingFigures], wanted: Callable[[Place], bool] = lambda _: True, *, most: float | None = None
) -> Mean | None:
    """Cake's mean speed-ups over the places that are `wanted`; single ones above `most` are left out. None: none."""
    over: dict[str, list[float]] = {LOAD: [], COMPUTE: []}
    losing = 0
    here = [f for f in figures if wanted(f.place) and cake_of(f) is not None and LOAD in f.methods]
    for f in here:
        cake = cake_of(f) or CAKE
        gains = {side: f.speedup(cake, side) or 0.0 for side in over}
        losing += min(gains.values()) < 1
        for side, gain in gains.items():
            if most is None or gain <= most:
                over[side].append(gain)
    if not here or not all(over.values()):
        return None
    return Mean(fmean(over[LOAD]), fmean(over[COMPUTE]), len(here), losing)
