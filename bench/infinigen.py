"""InfiniGen's share fetched and recall: what part of the host's KV it reads, and how much of the best it finds.

Run `python bench/infinigen.py`. *share* is tokens fetched over tokens that could have been, per layer and head.
*recall* is how many of the tokens that the true query scores highest, as many as were fetched, were among those
fetched (the engine's `audit`); picking at random would give the share. *agreement* is the share of greedy tokens
before the first difference from the full cache. Random weights: a trained model concentrates its attention more.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from kvwise.core.config import EngineConfig
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from machine import write_results


def run(loaded: LoadedModel, strategy: str, prompts: list[list[int]], num_new: int) -> list[RequestOutput]:
    """Greedy outputs of all prompts under a strategy."""
    longest = len(prompts[0]) + num_new
    layer_bytes = 2 * loaded.num_kv_heads * loaded.head_dim * 4
    pool = (len(prompts) + 1) * (longest + 64) * loaded.num_layers * layer_bytes
    config = EngineConfig(kv_cache_memory_bytes=pool, max_model_len=longest, audit=True)
    with Engine(loaded, parse(strategy), config) as engine:
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        ids = [engine.add_request(p, params) for p in prompts]
        done: dict[str, RequestOutput] = {}
        while engine.has_unfinished():
            done.update({o.request_id: o for o in engine.step() if o.finished})
    failed = [o.error for o in done.values() if o.error]
    if failed:
        raise RuntimeError(f"{strategy}: {failed[0]}")
    return [done[i] for i in ids]


def figures(outputs: list[RequestOutput], full: list[RequestOutput]) -> dict[str, float]:
    """Share fetched, recall and agreement over all requests."""
    seen = [o.attestation for o in outputs]
    alike = total = 0
    for ours, theirs in zip(outputs, full, strict=True):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=True))
        alike += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return {
        "share": sum(a.tokens_fetched for a in seen) / sum(a.fetch_candidates for a in seen),
        "recall": sum(a.recall_hits for a in seen) / sum(a.recall_total for a in seen),
        "agreement": alike / total,
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="random:3m,random:13m,random:60m")
    parser.add_argument("--contexts", default="256,1024")
    parser.add_argument("--strategies", default="infinigen,infinigen(alpha=2),infinigen(budget=1)")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/infinigen-<date>.json)")
    args = parser.parse_args()
    found = []
    print(f"{'model':14}{'context':>8}  {'strategy':24}{'share':>8}{'recall':>8}{'agreement':>11}")
    for name in args.models.split(","):
        loaded = load_model(name)
        for context in map(int, args.contexts.split(",")):
            generator = torch.Generator().manual_seed(args.seed)
            # Printable bytes, as the byte vocabulary's text has them.
            prompts = torch.randint(32, 127, (args.requests, context), generator=generator).tolist()
            full = run(loaded, "full", prompts, args.new)
            for strategy in args.strategies.split(","):
                row = figures(run(loaded, strategy, prompts, args.new), full)
                print(f"{name:14}{context:8}  {strategy:24}" + "".join(f"{row[k]:>{w}.1%}" for k, w in
                      (("share", 8), ("recall", 8), ("agreement", 11))), flush=True)  # fmt: skip
                found.append({"model": name, "context": context, "strategy": strategy, **row})
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write_results(args.json or Path(__file__).parent / "results" / f"infinigen-{date}.json", found, seed=args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
