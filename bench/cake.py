"""Cake on a real model over a throttled link: the time to the first token over a grid, against what was possible.

Run `python bench/cake.py` on a quiet machine (8 minutes). At every place of the grid (prefix length x share of the
step x bandwidth) computing, loading and Cake take turns over one prefix that lies in a tier and not on the device;
medians over `--repeats` runs. Bandwidths are multiples of the place's own break-even, at which loading its prefix takes
as long as computing it with its share.

Gates: in the median over the grid Cake takes at most 1.10 x Tc*Tl/(Tc+Tl) + one chunk; nowhere more than
min(Tc, Tl) + one chunk. Tc and Tl are what computing and loading took in the same runs; *one chunk* is the longer of a
step and an I/O chunk. Tokens are compared too: the first token must be the one that computing gives.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch

from kvwise.study.loading import Calibration, Point, calibrate
from kvwise.study.loading_figures import LoadingFigures, cake_of, loading_figures, mean_speedups
from kvwise.study.loading_section import COMPUTE, LOAD, Loading
from kvwise.study.plan import Plan
from kvwise.study.rows import Row
from kvwise.study.workbench import Workbench
from machine import write_results

PAPER = 2.6  # mean reduction of TTFT against both baselines, Cake (arXiv 2410.03065), abstract
SLACK = 1.10
MULTIPLES = (0.3, 0.7, 1.0, 2.0, 4.0)
SEED = 0


def measure(bench: Workbench, table: Loading, model: str, context: int, share: float, repeats: int) -> list[Row]:
    """Rows of all bandwidths at one length and share."""
    facts = bench.facts(model)
    known: Calibration = calibrate(bench, table, model, context, SEED, facts)
    rows: list[Row] = []
    with Point(bench, table, model, context, share, known.full_step_s, SEED) as point:
        for text in table.bandwidths:
            place = {"block": table.name, "model": model, "context": context, "compute_share": share}
            speed = float(text.removesuffix("x")) * known.break_even * share
            measured = point.measure(speed, repeats)
            even = known.break_even * share
            rows += [row | place | {"bandwidth": text, "break_even_bytes_per_s": even} for row in measured]
    return rows


def ratios(f: LoadingFigures) -> dict[str, float]:
    """Cake's time over the optimum, over the optimum with its allowance, and over the better side with one chunk."""
    cake = f.methods[cake_of(f) or ""].ttft.value
    better = min(f.methods[COMPUTE].ttft.value, f.methods[LOAD].ttft.value)
    assert f.optimum is not None
    return {
        "cake_s": cake,
        "compute_s": f.methods[COMPUTE].ttft.value,
        "load_s": f.methods[LOAD].ttft.value,
        "optimum_s": f.optimum.value,
        "chunk_s": f.chunk_s,
        "over_optimum": cake / f.optimum.value,
        "over_allowed": cake / (SLACK * f.optimum.value + f.chunk_s),
        "over_better": cake / (better + f.chunk_s),
        "bytes_per_s": f.bytes_per_s,
    }


def report(figures: list[LoadingFigures]) -> tuple[list[dict[str, object]], list[str]]:
    """The table on the terminal; its rows, and the gates that do not hold."""
    head = ("tokens", "share", "link", "Tc ms", "Tl ms", "Cake ms", "best ms", "/best", "/allowed", "/better")
    print("  ".join(f"{name:>9}" for name in head))
    rows: list[dict[str, object]] = []
    for f in figures:
        r = ratios(f)
        rows.append({"context": f.place.context, "share": f.place.share, "bandwidth": f.place.bandwidth} | dict(r))
        cells = [f"{f.place.context}", f"{f.place.share:g}", f.place.bandwidth]
        cells += [f"{1e3 * r[name]:.1f}" for name in ("compute_s", "load_s", "cake_s", "optimum_s")]
        cells += [f"{r[name]:.2f}" for name in ("over_optimum", "over_allowed", "over_better")]
        print("  ".join(f"{cell:>9}" for cell in cells))
    found = [ratios(f) for f in figures]
    allowed, worst = median(r["over_allowed"] for r in found), max(r["over_better"] for r in found)
    print(f"TTFT / (1.10 Tc*Tl/(Tc+Tl) + one chunk): median {allowed:.2f} (gate 1.00)")
    print(f"TTFT / (min(Tc, Tl) + one chunk): most {worst:.2f} (gate 1.00), median "
          f"{median(r['over_better'] for r in found):.2f}")  # fmt: skip
    mean = mean_speedups(figures)
    assert mean is not None
    print(f"mean speed-up: {mean.over_load:.2f}x against loading, {mean.over_compute:.2f}x against computing, "
          f"{(mean.over_load + mean.over_compute) / 2:.2f}x on average; the paper's {PAPER}x")  # fmt: skip
    broken = [f"median over the optimum {allowed:.2f}"] if allowed > 1 else []
    return rows, broken + ([f"over the better side {worst:.2f}"] if worst > 1 else [])


def main() -> int:
    """Measure, print, write; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:13m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.125])
    parser.add_argument("--multiples", type=float, nargs="+", default=list(MULTIPLES), help="of the break-even")
    parser.add_argument("--tier", default="host(size=256MiB)")
    parser.add_argument("--step-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=64, help="tokens of an I/O chunk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds: no further place is begun then")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / f"cake-{time.strftime('%F')}.json"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table = Loading(
        name="grid",
        models=(given.model,),
        methods=(LOAD, f"cake(chunk={given.chunk})"),
        tier=given.tier,
        context_lengths=tuple(given.contexts),
        bandwidths=tuple(f"{m:g}x" for m in given.multiples),
        compute_shares=tuple(given.shares),
        step_tokens=given.step_tokens,
        repeats=given.repeats,
    )
    plan = Plan(loading=(table,), threads=given.threads)
    bench, began, rows = Workbench(plan), time.perf_counter(), list[Row]()
    for context, share in product(given.contexts, given.shares):
        if time.perf_counter() - began > given.time_limit:
            print(f"time limit: {context} tokens at a share of {share:g} and what follows is left out")
            break
        rows += measure(bench, table, given.model, context, share, given.repeats)
        print(f"{context} tokens, share {share:g}: done after {time.perf_counter() - began:.0f} s", flush=True)
    grid, broken = report(loading_figures(rows))
    facts = {"model": given.model, "tier": given.tier, "step_tokens": given.step_tokens, "chunk": given.chunk,
             "repeats": given.repeats, "paper_mean": PAPER}  # fmt: skip
    write_results(given.out, grid, seed=SEED, **facts, runs=rows)
    print(f"written to {given.out}")
    for text in broken:
        print(f"GATE: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
