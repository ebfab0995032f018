"""The workloads of bench/engine.py, their limits and gates, and how their results are told."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import ceilings
from engine_sides import Prompts
from kvwise.models.loaded import LoadedModel

OURS, HALF = "kvwise", "kvwise fp16 KV"
# Gates are against transformers as it comes. A static cache has to be asked for: its ratio is told beside the gate.
RIVALS, TUNED = ("generate", "generate_batch"), "generate static"


@dataclass(frozen=True)
class Workload:
    """Prompts of one shape, what is measured of them, and the gates: metric -> ratio to the better rival."""

    name: str
    title: str
    num_requests: int
    prompt: int
    output: int
    gates: dict[str, float]
    shared: int = 0  # tokens of the prompt that all requests of a run have in common
    metrics: tuple[str, ...] = ("end_to_end", "decode")
    long: bool = False  # cold runs take minutes: --long-repeats of them


WORKLOADS = (
    Workload("a", "16 requests, 512 in, 128 out", 16, 512, 128, {"decode": 2.0, "end_to_end": 2.0}),
    Workload("b", "8 requests at 8k, 32 out", 8, 8192, 32, {"decode": 5.0}, long=True),
    Workload(
        "c", "16 requests, shared 2k prefix + 64 in, 64 out", 16, 2112, 64, {"end_to_end": 3.0}, shared=2048,
        metrics=("end_to_end",),
    ),
    Workload("d", "prefill of one 8k prompt", 1, 8192, 1, {"prefill": 0.95}, metrics=("prefill",)),
    Workload("e", "first token, 2k prefix cached + 16 in", 1, 2064, 1, {"ttft": 1.0}, 2048, ("ttft",)),
)  # fmt: skip
UNITS = {"end_to_end": "tok/s", "decode": "tok/s", "prefill": "tok/s", "ttft": "ms"}


@dataclass
class Results:
    """Figures by (side, metric), greedy tokens by side of the last run, and why a side was left out."""

    figures: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, side: str, metric: str, value: float) -> None:
        """Note one figure."""
        self.figures.setdefault((side, metric), []).append(value)

    def median(self, side: str, metric: str) -> float | None:
        """The median, or None if the side was left out."""
        values = self.figures.get((side, metric))
        return statistics.median(values) if values else None


def draw(work: Workload, vocab_size: int, generator: torch.Generator) -> Prompts:
    """Prompts never seen before, with their shared beginning; for the cached prefix, three tails behind it."""
    count = work.num_requests if "ttft" not in work.metrics else 4

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(3, vocab_size, shape, generator=generator)

    prefix = tokens(1, work.shared).expand(count, -1)
    return torch.cat([prefix, tokens(count, work.prompt - work.shared)], dim=1).tolist()


def limits(work: Workload, loaded: LoadedModel, ceiling: ceilings.Ceilings) -> dict[str, float]:
    """What each metric could be at most (ttft: at least) on this machine, from bytes and operations."""
    new, cached = work.prompt - work.shared, work.shared
    step = ceilings.decode_step(loaded, work.num_requests, work.prompt + work.output // 2).seconds(ceiling)
    first = ceilings.prefill(loaded, work.prompt).seconds(ceiling)
    rest = ceilings.prefill(loaded, new, cached).seconds(ceiling)
    prompts = work.num_requests * rest
    if work.shared and work.num_requests > 1:
        prompts += ceilings.prefill(loaded, cached).seconds(ceiling)
    total = prompts + step * (work.output - 1)
    found = {
        "decode": work.num_requests / step,
        "end_to_end": work.num_requests * work.output / total,
        "prefill": work.prompt / first,
        "ttft": rest * 1e3,
    }
    return {metric: found[metric] for metric in work.metrics}


def rows(work: Workload, results: Results, limit: dict[str, float]) -> Iterator[dict[str, object]]:
    """One row for each side and metric."""
    for metric in work.metrics:
        best = best_rival(results, metric)
        for (side, name), values in results.figures.items():
            if name != metric:
                continue
            middle = statistics.median(values)
            share = limit[metric] / middle if metric == "ttft" else middle / limit[metric]
            yield {
                "workload": work.name, "title": work.title, "metric": metric, "unit": UNITS[metric], "side": side,
                "median": middle, "lowest": min(values), "highest": max(values), "runs": len(values),
                "of_limit": share, "to_best_rival": middle / best[1] if best else None,
                "best_rival": best[0] if best else None,
            }  # fmt: skip


def best_rival(results: Results, metric: str) -> tuple[str, float] | None:
    """The better of transformers' sides as they come."""
    found = [(side, value) for side in RIVALS if (value := results.median(side, metric)) is not None]
    pick = min if metric == "ttft" else max
    return pick(found, key=lambda pair: pair[1]) if found else None


def verdicts(work: Workload, results: Results) -> Iterator[dict[str, object]]:
    """Each gate: the ratio needed, the ratio reached, whether it passed."""
    for metric, needed in work.gates.items():
        ours, rival = results.median(OURS, metric), best_rival(results, metric)
        if ours is None or rival is None:
            continue
        reached = ours / rival[1]
        passed = reached <= needed if metric == "ttft" else reached >= needed
        tuned = results.median(TUNED, metric)
        yield {
            "workload": work.name, "metric": metric, "needed": needed, "reached": reached, "passed": passed,
            "against": rival[0], "to_tuned": None if tuned is None else ours / tuned,
        }  # fmt: skip


def agreement(results: Results) -> dict[str, dict[str, float]]:
    """Greedy tokens of each side against ours: requests that are equal to the end, and tokens before the first
    difference, as shares."""
    ours = results.tokens.get(OURS, [])
    found = {}
    for side, tokens in results.tokens.items():
        if side == OURS or not ours:
            continue
        alike = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
                 for a, b in zip(ours, tokens, strict=True)]  # fmt: skip
        whole = sum(map(len, ours))
        equal = sum(n == len(a) for n, a in zip(alike, ours, strict=True))
        found[side] = {"requests": equal / len(ours), "tokens": sum(alike) / whole}
    return found


def tell(work: Workload, results: Results, limit: dict[str, float]) -> dict[str, Any]:
    """Print one workload's table; the same as data."""
    print(f"\n({work.name}) {work.title}")
    for metric, value in limit.items():
        print(f"  limit of {metric.replace('_', ' ')}: {value:,.1f} {UNITS[metric]}")
    found = list(rows(work, results, limit))
    for row in found:
        spread = f"{row['lowest']:,.1f}-{row['highest']:,.1f}"
        versus = f"{row['to_best_rival']:5.2f} x {row['best_rival']}" if row["best_rival"] else ""
        print(
            f"  {str(row['metric']).replace('_', ' '):11} {row['side']:22} {row['median']:9,.1f} {row['unit']:6}"
            f" ({spread}; {row['runs']})  {row['of_limit']:4.0%} of limit  {versus}"
        )
    alike = agreement(results)
    for side, share in alike.items():
        print(f"  greedy tokens as kvwise's: {side:22} {share['requests']:4.0%} of requests to the end,"
              f" {share['tokens']:4.0%} of tokens before the first difference")  # fmt: skip
    for side, reason in results.skipped.items():
        print(f"  skipped: {side}: {reason}")
    gates = list(verdicts(work, results))
    for gate in gates:
        sign = "<=" if gate["metric"] == "ttft" else ">="
        word = "pass" if gate["passed"] else "MISSED"
        tuned = "" if gate["to_tuned"] is None else f" ({gate['to_tuned']:.2f} x {TUNED})"
        name = str(gate["metric"]).replace("_", " ")
        print(f"  gate: {name} {gate['reached']:.2f} x {gate['against']} {sign} {gate['needed']}: {word}{tuned}")
    return {"rows": found, "limits": limit, "agreement": alike, "skipped": results.skipped, "gates": gates}
