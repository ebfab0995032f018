"""Published figures beside ours: what a paper measured where, what we measured there, and what differs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvwise.study.loading_figures import LoadingFigures, Place, cake_of, mean_speedups
from kvwise.study.loading_section import COMPUTE, LOAD

MOST = 10.0  # the paper leaves single speed-ups above this out of the means of its Table 3
TABLE_3, TABLE_5, TABLE_6, FIGURE_6 = "table 3", "table 5", "table 6", "figure 6"
ALONE, LEAST_SHARE, HALF = 1.0, 0.125, 0.5
# Bandwidths of the plan, relative to the break-even -> the paper's, in Gbps.
GBPS = {"0.132x": 7, "0.472x": 25, "0.604x": 32, "1.06x": 56, "1.89x": 100}
SMALL_KV, LARGE_MODEL = "2.3x", "6.9x"  # where 32 Gbps stands for Llama-3.1-8B and for the 70B model


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of a paper and ours. `losing`: ours is slower than a side that it should not be slower than."""

    where: str
    what: str
    paper: str
    ours: str
    losing: bool = False


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper that a study stands beside."""

    title: str
    differs: tuple[str, ...]
    compare: Callable[[Sequence[LoadingFigures]], list[Comparison]]


def compare_paper(paper: str | None, figures: Sequence[LoadingFigures]) -> tuple[Paper, list[Comparison]] | None:
    """The paper and its figures beside ours; None: the plan names none, or nothing was measured."""
    found = _PAPERS.get(paper or "")
    return None if found is None or not figures else (found, found.compare(figures))


def _cake(figures: Sequence[LoadingFigures]) -> list[Comparison]:
    longest, shortest = (pick(f.place.context for f in figures) for pick in (max, min))
    rows = [
        _overall(figures),
        _mean(figures, TABLE_3, "mean over bandwidths and shares", "2.23 \\ 3.76"),
        _single(figures, "whole step, 32 Gbps", "2.63 \\ 1.59 (2 A100); 2.40 \\ 1.75 (H100); 2.00 \\ 1.91 (A100)",
                lambda p: p.block == TABLE_3 and p.share == ALONE and _gbps(p) == 32),
        _mean(figures, TABLE_5, "mean over lengths and bandwidths", "3.34 \\ 2.24"),
        _single(figures, "4K, 32 Gbps", "2.67 \\ 1.25",
                lambda p: p.block == TABLE_5 and p.context == shortest and _gbps(p) == 32),
        _single(figures, "16K, 32 Gbps", "2.63 \\ 1.59",
                lambda p: p.block == TABLE_5 and p.context == longest and _gbps(p) == 32),
        _single(figures, "4K, 7 Gbps: a losing point", "– \\ 0.99",
                lambda p: p.block == TABLE_5 and p.context == shortest and _gbps(p) == 7),
        _mean(figures, TABLE_6, "mean over models, shares and bandwidths", "2.68 \\ 3.01; 4 losing points"),
        _single(figures, "small KV (Llama-3.1-8B), whole step, 32 Gbps", "1.37 \\ 3.18",
                lambda p: p.block == TABLE_6 and p.share == ALONE and p.bandwidth == SMALL_KV),
        _single(figures, "70B, 50 % of each step: a losing point", "0.91 \\ –",
                lambda p: p.block == TABLE_6 and p.share == HALF and p.bandwidth == LARGE_MODEL),
        _single(figures, "70B, 12.5 % of each step, 32 Gbps: a losing point", "0.80 \\ 44.26",
                lambda p: p.block == TABLE_6 and p.share == LEAST_SHARE and p.bandwidth == LARGE_MODEL),
        *_mixed(figures),
    ]  # fmt: skip
    return [row for row in rows if row is not None]


def _gbps(place: Place) -> int | None:
    return GBPS.get(place.bandwidth)


def _alone(place: Place) -> bool:
    return place.num_others == 0


def _overall(figures: Sequence[LoadingFigures]) -> Comparison | None:
    found = mean_speedups(figures, _alone, most=MOST)
    if found is None:
        return None
    mean = (found.over_load + found.over_compute) / 2
    ours = f"{mean:.2f} ({found.num} places; {found.losing} of them below 1 against a side)"
    return Comparison("all", "mean over both baselines", "2.6", ours)


def _mean(figures: Sequence[LoadingFigures], block: str, what: str, paper: str) -> Comparison | None:
    found = mean_speedups(figures, lambda p: p.block == block, most=MOST)
    if found is None:
        return None
    losing = f"; {found.losing} losing of {found.num}" if block == TABLE_6 else ""
    return Comparison(block, what, paper, f"{found.over_load:.2f} \\ {found.over_compute:.2f}{losing}")


def _single(
    figures: Sequence[LoadingFigures], what: str, paper: str, wanted: Callable[[Place], bool]
) -> Comparison | None:
    for f in figures:
        cake = cake_of(f)
        if wanted(f.place) and cake is not None:
            gains = [f.speedup(cake, side) for side in (LOAD, COMPUTE)]
            ours = " \\ ".join("–" if gain is None else f"{gain:.2f}" for gain in gains)
            # Within a chunk of the better side is a draw: what was begun last has to end.
            return Comparison(f.place.block, what, paper, ours, losing=not f.near_better(cake))
    return None


def _mixed(figures: Sequence[LoadingFigures]) -> list[Comparison]:
    rows = []
    for f in figures:
        cake = cake_of(f)
        if f.place.block != FIGURE_6 or cake is None:
            continue
        ours = f.methods[cake].all_first.value
        for side, word in ((LOAD, "loading only"), (COMPUTE, "computing only")):
            gain = f.speedup(cake, side, whole=True)
            if gain is not None:
                theirs = f.methods[side].all_first.value
                what = f"1 long and {f.place.num_others} short requests, against {word}"
                told = f"{theirs:.3g} → {ours:.3g} s, {100 * (gain - 1):+.0f} % throughput"
                rows.append(Comparison(FIGURE_6, what, "1.5 → 1.19 s, +26 % (its baseline is not named)", told))
    return rows


_CAKE = Paper(
    "Cake: Compute Or Load KV Cache, arXiv 2410.03065 (ICML 2025)",
    (
        "the link: theirs is delay injection, which was not calibrated against a device; ours is a throttled link, "
        "whose transfers never end before a link of that speed could have ended them",
        "bandwidths: in the paper's ratios (7, 25, 32, 56, 100 Gbps), placed so that 32 Gbps stands where Table 3 has "
        "it: 1.59/2.63 = 0.60 of the bandwidth at which loading the longest prefix takes as long as computing it; "
        "32 Gbps of Llama-3.1-8B and of the 70B model stand at 2.3 and 6.9 of it, for the same reason",
        "the model: a small one with random weights on this processor, at an eighth of the paper's lengths, token "
        "budget (64) and I/O chunk (16 tokens); theirs were 7B to 70B on A100 and H100",
        "shares: of each step's tokens, as in the paper; a step is drawn out to what a full one takes, since there are "
        "no others here to fill it",
        "the baselines: plain prefill, and loading everything before anything is computed, in the same engine; theirs "
        "were vLLM v0.6.2 and LMCache v0.1.4",
        "Cake: ours has three exceptions to the paper's rule, which are there for its losing points",
        f"means: single speed-ups above {MOST:g} are left out of all of ours, as in the paper's Table 3",
        "not run: Table 4 (chunk sizes) and Table 7 (compressed KV)",
    ),
    _cake,
)
_PAPERS = {"2410.03065": _CAKE}
