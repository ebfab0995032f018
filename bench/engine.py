"""The engine against transformers: one run, same weights (fp32), same threads, sides interleaved.

Run `python bench/engine.py`. A Llama shape of about 100 M parameters with random weights (`random:100m-bench`), five
workloads, greedy, every request with a fixed number of output tokens. Gates are ratios to the *better* of
transformers' sides as they come: `generate` (whole batch at once, SDPA, its growing cache) and `generate_batch` (its
continuous batching). `generate` with a static cache, which has to be asked for, is told beside the gate. Rows go to
bench/results/engine-<date>.json; exit 1 if a gate is missed.

What the columns mean: *end to end* counts output tokens from the first call to the last token, prompts unseen.
*decode* counts the tokens that come after every request has its first one, over that time; it is measured on a
second, warm run of the same prompts, whose KV every side still holds, so that only decode is left.
"""

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

import ceilings
from anatomy import anatomy
from engine_sides import ContinuousBatching, Generate, Kvwise, Prompts, Side
from engine_table import HALF, OURS, WORKLOADS, Results, Workload, draw, limits, tell
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.models.random import RANDOM_MODELS, build
from machine import provenance
from openvino_side import OpenVino

MODEL = "100m-bench"


def measure(work: Workload, sides: Sequence[Side], args: argparse.Namespace) -> Results:
    """Run one workload on all sides, interleaved; a side that fails is left out with its reason."""
    results = Results()
    generator = torch.Generator().manual_seed(args.seed)
    for side in sides:
        attempt(side, results, lambda side=side: side.open(work.num_requests, work.prompt + work.output))
    num_cold = args.long_repeats if work.long else args.repeats
    for repeat in range(args.repeats):
        prompts = draw(work, RANDOM_MODELS[MODEL]().vocab_size, generator) if repeat < num_cold else None
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
        told = (f"{name} {value:.1%}" if "share" in name else f"{name} {value:.2f}" for name, value in spent.items())
        print(f"  {title:26}" + "   ".join(told))
        found[title] = spent
    return found


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
    """The command line."""
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
    about = {**provenance(args.seed), "transformers": transformers.__version__, "max_num_batched_tokens": args.batched}
    facts = {"model": loaded.name, "parameters": loaded.num_parameters, **about}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    ceiling = ceilings.measure(args.threads)
    print(f"measured: read {ceiling.read / 1e9:.1f} GB/s, fp32 matmul {ceiling.matmul / 1e9:.0f} GFLOP/s")
    report: dict[str, object] = {"read_bytes_per_s": ceiling.read, "matmul_flops_per_s": ceiling.matmul}
    sides = make_sides(loaded, args)
    gates: list[dict[str, object]] = []
    for work in WORKLOADS:
        if work.name in args.only:
            found = tell(work, measure(work, sides, args), limits(work, loaded, ceiling))
            report[work.name] = found
            gates += found["gates"]
    report["share"] = tell_share(Kvwise(loaded, OURS, "float32", args.batched), args)
    path = args.json or Path(__file__).parent / "results" / f"engine-{str(about['time'])[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": facts, **report}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0 if all(gate["passed"] for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
