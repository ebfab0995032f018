"""The engine against transformers: one run, same weights (fp32), same threads, sides interleaved.

Run `python bench/engine.py`. A Llama shape of about 100 M parameters with random weights (`random:100m-bench`), five
workloads, greedy, every request with a fixed number of output tokens. Gates are ratios to the *better* of the plain
sides of transformers: `generate` (whole batch at once, SDPA, growing or static cache) and `generate_batch` (its
continuous batching). Rows go to bench/results/engine-<date>.json; exit 1 if a gate is missed.

What the columns mean: *end to end* counts output tokens from the first call to the last token, prompts unseen.
*decode* counts the tokens that come after every request has its first one, over that time; it is measured on a
second, warm run of the same prompts, whose KV every side still holds, so that only decode is left.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import ceilings
import torch
import transformers
from anatomy import anatomy
from engine_sides import ContinuousBatching, Generate, Kvwise, Prompts, Run, Side
from openvino_side import OpenVino

from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.models.random import RANDOM_MODELS, build

MODEL = "100m-bench"
OURS, HALF = "kvwise", "kvwise fp16 KV"
RIVALS = ("generate", "generate static", "generate_batch")


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
        self.figures.setdefault((side, metric), []).append(value)

    def median(self, side: str, metric: str) -> float | None:
        values = self.figures.get((side, metric))
        return statistics.median(values) if values else None


# -- running ----------------------------------------------------------------------------------------------------


def measure(work: Workload, sides: Sequence[Side], args: argparse.Namespace) -> Results:
    """Run one workload on all sides, interleaved; a side that fails is left out with its reason."""
    results = Results()
    generator = torch.Generator().manual_seed(args.seed)
    for side in sides:
        attempt(side, results, lambda side=side: side.open(work.num_requests, work.prompt + work.output))
    num_cold = args.long_repeats if work.long else args.repeats
    for repeat in range(args.repeats):
        prompts = draw(work, generator) if repeat < num_cold else None
        for side in sides:
            print(f"\r({work.name}) {repeat + 1}/{args.repeats} {side.name:24}", end="", file=sys.stderr, flush=True)
            attempt(side, results, lambda side=side, prompts=prompts: run_once(work, side, prompts, results))
    for side in sides:
        side.close()
    return results


def attempt(side: Side, results: Results, call: Callable[[], None]) -> None:
    """Call; a side that fails is left out from then on, with its reason."""
    if side.name in results.skipped:
        return
    try:
        call()
    except Exception as error:
        traceback.print_exc()
        results.skipped[side.name] = f"{type(error).__name__}: {error}"[:200]


def run_once(work: Workload, side: Side, prompts: Prompts | None, results: Results) -> None:
    """One repeat of one side; without new prompts only the warm part."""
    if "ttft" in work.metrics:
        assert prompts is not None
        runs = side.with_prefix(prompts[0][: work.shared], [p[work.shared :] for p in prompts])
        for run in runs[1:]:  # the first may still grow buffers
            results.add(side.name, "ttft", run.first_token * 1e3)
        results.tokens[side.name] = [t for run in runs for t in run.tokens]
        return
    if prompts is not None:
        run = side.cold(prompts, work.output)
        results.tokens[side.name] = run.tokens
        if "prefill" in work.metrics:
            results.add(side.name, "prefill", work.prompt * work.num_requests / run.first_token)
        if "end_to_end" in work.metrics:
            results.add(side.name, "end_to_end", run.end_to_end)
    if "decode" in work.metrics:
        results.add(side.name, "decode", side.warm(work.output).decode)


def draw(work: Workload, generator: torch.Generator) -> Prompts:
    """Prompts never seen before, with their shared beginning; for the cached prefix, three tails behind it."""
    count = work.num_requests if "ttft" not in work.metrics else 4

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(3, RANDOM_MODELS[MODEL]().vocab_size, shape, generator=generator)

    prefix = tokens(1, work.shared).expand(count, -1)
    return torch.cat([prefix, tokens(count, work.prompt - work.shared)], dim=1).tolist()


# -- telling ----------------------------------------------------------------------------------------------------


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
    """The better of the plain sides of transformers."""
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
        yield {"workload": work.name, "metric": metric, "needed": needed, "reached": reached, "passed": passed}


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


def tell(work: Workload, results: Results, limit: dict[str, float]) -> dict[str, object]:
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
        print(f"  gate: {gate['metric']} {gate['reached']:.2f} {sign} {gate['needed']}: {word}")
    return {"rows": found, "limits": limit, "agreement": alike, "skipped": results.skipped, "gates": gates}


def tell_share(ours: Kvwise, args: argparse.Namespace) -> dict[str, object]:
    """Where a step's time goes, from one instrumented run at batch 16 and one prompt of 4k."""
    found: dict[str, object] = {}
    print("\nwhere a step's time goes (perf_counter around each linear layer, each kernel call, the forward pass; ms)")
    generator = torch.Generator().manual_seed(args.seed + 1)
    for title, shape, num_new in (("decode, batch 16 at 512", (16, 512), 33), ("prefill, one 4k prompt", (1, 4096), 2)):
        ours.open(shape[0], shape[1] + num_new)
        assert ours.engine is not None
        prompts = torch.randint(3, ours.engine.loaded.vocab_size, shape, generator=generator).tolist()
        if num_new > 2:
            ours.cold(prompts, 1)  # from the cache: all requests decode together
        prefill, decode = anatomy(ours.engine, prompts, num_new)
        spent = (decode if num_new > 2 else prefill).median()
        ours.close()
        print(f"  {title:26}" + "".join(f"{k} {v:.1%}   " if "share" in k else f"{k} {v:.2f}   " for k, v in spent.items()))
        found[title] = spent
    return found


def provenance(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, object]:
    """Commit, versions, machine, threads, seed."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip() or "none",
        "machine": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}", "threads": args.threads, "seed": args.seed,
        "torch": torch.__version__, "transformers": transformers.__version__, "model": loaded.name,
        "num_parameters": loaded.num_parameters, "max_num_batched_tokens": args.batched,
    }  # fmt: skip


def make_sides(loaded: LoadedModel, args: argparse.Namespace) -> list[Side]:
    """All sides; those of transformers have a model of their own with the same weights, attention by SDPA."""
    model = build(RANDOM_MODELS[MODEL](), 0, lambda _: None)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None  # every side gives exactly the tokens asked for
    paged = build(RANDOM_MODELS[MODEL](), 0, lambda _: None)
    paged.generation_config.eos_token_id = None
    sides: list[Side] = [
        Kvwise(loaded, OURS, "float32", args.batched),
        Kvwise(loaded, HALF, "float16", args.batched),
        Generate(model, "generate", static=False),
        Generate(model, "generate static", static=True),
        ContinuousBatching(paged, "generate_batch", args.batched),
    ]
    if args.openvino:
        sides += [OpenVino(args.openvino, model, kv, args.threads, args.batched) for kv in ("f32", "f16")]
    return [s for s in sides if not args.sides or s.name in args.sides.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="abcde", help="workloads, such as ac")
    parser.add_argument("--sides", default="", help="names of sides, separated by commas (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-repeats", type=int, default=1, help="cold runs of workload b (minutes each)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batched", type=int, default=512, help="tokens of a step, kvwise and generate_batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--openvino", help="a Python that has openvino-genai, optimum-intel")
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/engine-<date>.json)")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; exit 1 if a gate is missed."""
    args = parse()
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    loaded = load_model(f"random:{MODEL}")
    about = provenance(args, loaded)
    print("  ".join(f"{k} {v}" for k, v in about.items()))
    ceiling = ceilings.measure()
    print(f"measured: read {ceiling.read / 1e9:.1f} GB/s, fp32 matmul {ceiling.matmul / 1e9:.0f} GFLOP/s")
    sides = make_sides(loaded, args)
    report: dict[str, object] = {**about, "read_bytes_per_s": ceiling.read, "matmul_flops_per_s": ceiling.matmul}
    missed = False
    for work in WORKLOADS:
        if work.name in args.only:
            found = tell(work, measure(work, sides, args), limits(work, loaded, ceiling))
            report[work.name] = found
            missed |= not all(gate["passed"] for gate in found["gates"])  # type: ignore[attr-defined]
    report["share"] = tell_share(Kvwise(loaded, OURS, "float32", args.batched), args)
    path = args.json or Path(__file__).parent / "results" / f"engine-{about['date'][:10]}.json"  # type: ignore[index]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
