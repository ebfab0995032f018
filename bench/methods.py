"""What a method costs while decoding: its step against a step of plain full attention over as many tokens.

Run `python bench/methods.py`. Each side is an engine with `--batch` requests. The methods have prompts of `--context`
tokens and keep what their budget allows; the base of each is the full cache with a prompt of as many tokens as the
method has kept, so that both attend to equally much and what differs is the method's own work: choosing who leaves,
packing, fetching. Steps of all sides take turns; the ratio of a side is the median of its steps over the median of its
base's. The limit is 1. Retention methods must stay below 1.10 (a gate); other rows inform.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from kvwise.core.config import EngineConfig
from kvwise.core.method import Axis
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import catalogue, parse
from kvwise.methods.retention.base import Retention
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from machine import write_results

GATE = 1.10
# Options without which a method does not serve a model with random weights.
NEEDED: dict[str, dict[str, object]] = {"less": {"weights": "untrained"}, "kvsharer": {"map": "1:0-5:4"}}


@dataclass
class Side:
    """One engine, its step times in seconds, and how many tokens a head holds when decoding begins."""

    name: str
    engine: Engine
    held: int
    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One decode step of all requests, timed."""
        began = time.perf_counter()
        self.engine.step()
        self.seconds.append(time.perf_counter() - began)


def prepared(loaded: LoadedModel, strategy: str, context: int, args: argparse.Namespace) -> Side:
    """An engine whose requests have all been prefilled under a strategy and decode from now on."""
    longest = context + args.steps + 64
    token_bytes = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * 4
    config = EngineConfig(
        kv_cache_memory_bytes=2 * args.batch * (longest + 64) * token_bytes,
        max_model_len=longest,
        max_num_seqs=args.batch,
        max_num_batched_tokens=max(512, args.batch),
        kernels=args.kernels,
    )
    engine = Engine(loaded, parse(strategy), config)
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(32, 127, (args.batch, context), generator=generator).tolist()
    params = SamplingParams(max_tokens=args.steps + 32, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in prompts]
    while any(not engine._requests[name][0].num_outputs for name in names):
        engine.step()
    for _ in range(3):
        engine.step()
    return Side(strategy, engine, held_by(engine, names[0]))


def held_by(engine: Engine, name: str) -> int:
    """Tokens that a head of a request holds on the device, on average."""
    sequence = engine._requests[name][0]
    if not sequence.settled:
        return sequence.num_computed
    kept = [head.kept for layer in engine.memory.placement.explain(sequence) for head in layer]
    return round(sum(map(len, kept)) / len(kept))


def compare(loaded: LoadedModel, strategies: Sequence[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of figures: each strategy's step over that of the full cache with equally many tokens."""
    sides = [prepared(loaded, strategy, args.context, args) for strategy in strategies]
    bases = {held: prepared(loaded, "full", held - 3, args) for held in dict.fromkeys(side.held for side in sides)}
    every = [*bases.values(), *sides]
    for _ in range(args.steps - 8):
        for side in every:
            side.step()
    rows: list[dict[str, object]] = []
    for side in sides:
        mine, base = median(side.seconds), median(bases[side.held].seconds)
        low, _, high = quantiles(side.seconds, n=4)
        rows.append({
            "strategy": side.name, "held": side.held, "step_ms": mine * 1e3, "base_ms": base * 1e3,
            "ratio": mine / base, "quartiles_ms": [low * 1e3, high * 1e3],
            "mean_ratio": sum(side.seconds) / sum(bases[side.held].seconds),
        })  # fmt: skip
    for side in every:
        side.engine.close()
    return rows


def all_strategies(budget: float) -> list[str]:
    """Every retention method at the budget, where it has one, and every encoding."""
    found = []
    for kind in catalogue():
        if kind.axis in (Axis.RETENTION, Axis.ENCODING) and not kind.default:
            options = {"budget": budget} if "budget" in kind.__dataclass_fields__ else {}
            found.append(str(kind.build({**options, **NEEDED.get(kind.name, {})})))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:100m-bench")
    parser.add_argument("--strategies", help="joined by ; (default: every retention method and encoding)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", help="of both sides, such as cpu-avx2 (default: the fastest)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/methods-<date>.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    strategies = args.strategies.split(";") if args.strategies else all_strategies(args.budget)
    print(f"{args.model}, context {args.context}, batch {args.batch}, {args.threads} threads")
    print(f"{'strategy':36}{'held':>6}{'step ms':>9}{'base ms':>9}{'ratio':>7}{'mean':>7}  quartiles")
    rows = []
    for strategy in strategies:  # a few engines at a time: the sides of a ratio run together
        (row,) = compare(loaded, [strategy], args)
        low, high = row["quartiles_ms"]  # type: ignore[misc]
        print(
            f"{row['strategy']:36}{row['held']:>6}{row['step_ms']:>9.2f}{row['base_ms']:>9.2f}{row['ratio']:>7.2f}"
            f"{row['mean_ratio']:>7.2f}  {low:.2f}-{high:.2f}"
        )
        rows.append(row)
    failed = [r for r in rows if isinstance(parse(str(r["strategy"])).retention, Retention)
              and not parse(str(r["strategy"])).retention.default and float(str(r["ratio"])) > GATE]  # fmt: skip
    print("gate (retention <= 1.10):", ", ".join(f"{r['strategy']} {r['ratio']:.2f}" for r in failed) or "none failed")
    path = args.json or Path(__file__).parent / "results" / f"methods-{time.strftime('%Y-%m-%d')}.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "strategies", "seed")}
    write_results(path, rows, seed=args.seed, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
