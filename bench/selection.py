"""What selection methods read and move: share, recall, and bytes with and without the rows kept on the device.

Run `python bench/selection.py`. Per strategy: *share* is tokens read from the host's KV over tokens that could have
been, per layer and head. *recall* is how many of the tokens that the method would have named, had it known the true
scores, were among those (the engine's `audit`); picking at random would give the share. *agreement* is the share of
greedy tokens before the first difference from the full cache. *read* is the KV that one decoded token reads of the
host's, *moved* what of it went over the link (the rest was still on the device: `keep`), *run* the bytes that lie
together on the host, K or V. *index* and *staging* are device bytes, at most, over the bytes of the requests' whole KV.
Random weights attend more evenly than trained ones; `builtin:recall` is trained and reads its own kind of text.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvwise.core.config import EngineConfig
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.engine.placement.recall import RecallPlacement
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage
from machine import write_results

STRATEGIES = (
    "infinigen", "infinigen(keep=1)", "topk(keep=1)", "quest", "clusterkv", "clusterkv(keep=2)"
)  # fmt: skip
COLUMNS = (("share", 8, "%"), ("recall", 8, "%"), ("agreement", 11, "%"), ("read", 10, "k"), ("moved", 10, "k"),
           ("run", 8, "k"), ("index", 8, "%"), ("staging", 9, "%"))  # fmt: skip


@dataclass
class Run:
    """Outputs of all prompts, and what their engine did: runs on the host, most device bytes of index and staging."""

    outputs: list[RequestOutput]
    num_runs: int = 0
    index_bytes: int = 0
    staged_bytes: int = 0
    token_bytes: int = 0


def run(loaded: LoadedModel, strategy: str, prompts: list[list[int]], num_new: int, *, audit: bool) -> Run:
    """Greedy outputs of all prompts under a strategy."""
    longest = len(prompts[0]) + num_new
    layer_bytes = 2 * loaded.num_kv_heads * loaded.head_dim * 4
    pool = (len(prompts) + 1) * (longest + 64) * loaded.num_layers * layer_bytes
    config = EngineConfig(kv_cache_memory_bytes=pool, max_model_len=longest, audit=audit)
    found = Run([])
    with Engine(loaded, parse(strategy), config) as engine:
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        ids = [engine.add_request(p, params) for p in prompts]
        placement = engine.memory.placement
        done: dict[str, RequestOutput] = {}
        while engine.has_unfinished():
            done.update({o.request_id: o for o in engine.step() if o.finished})
            if isinstance(placement, RecallPlacement):
                found.index_bytes = max(found.index_bytes, placement.index.num_bytes)
                found.staged_bytes = max(found.staged_bytes, placement._tiers.staged_bytes)
                found.num_runs = placement._tiers.num_runs
        found.token_bytes = engine.memory.layout.token_bytes
    failed = [o.error for o in done.values() if o.error]
    if failed:
        raise RuntimeError(f"{strategy}: {failed[0]}")
    found.outputs = [done[i] for i in ids]
    return found


def figures(ours: Run, full: Run, row_bytes: int) -> dict[str, float]:
    """What the columns say, over all requests."""
    seen = [o.attestation for o in ours.outputs]
    alike = total = 0
    for our, their in zip(ours.outputs, full.outputs, strict=True):
        pairs = list(zip(our.token_ids, their.token_ids, strict=True))
        alike += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    fetched, moved = sum(a.tokens_fetched for a in seen), sum(a.bytes_fetched for a in seen)
    decoded = total - len(seen)  # the first token of each comes from prefill
    whole = sum(a.tokens_seen for a in seen) * ours.token_bytes
    return {
        "share": fetched / sum(a.fetch_candidates for a in seen),
        "recall": sum(a.recall_hits for a in seen) / sum(a.recall_total for a in seen),
        "agreement": alike / total,
        "read": fetched * row_bytes / decoded,
        "moved": moved / decoded,
        "hits": sum(a.tokens_recalled_cached for a in seen) / fetched,
        "run": moved / max(1, ours.num_runs),
        "index": ours.index_bytes / whole,
        "staging": ours.staged_bytes / whole,
    }


def prompts_for(loaded: LoadedModel, num: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of one length: random printable bytes, or the language of a model that has its own."""
    if not loaded.speaks_tokens:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(32, 127, (num, length), generator=generator).tolist()
    rng, language = np.random.default_rng(seed), TokenLanguage(loaded.vocab_size)
    episodes = [Recall().episode(rng, language, length) for _ in range(num)]
    asked = [[*e.context, *e.questions[0].prompt] for e in episodes]
    shortest = min(map(len, asked))
    return [[int(token) for token in prompt[-shortest:]] for prompt in asked]


def show(value: float, width: int, kind: str) -> str:
    """A share in per cent, or bytes in KiB."""
    return {"%": f"{value:.1%}", "k": f"{value / 1024:.1f}K"}[kind].rjust(width)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["random:13m", "builtin:recall"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/selection-<date>.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    print(f"{'model':16}{'context':>8}  {'strategy':22}" + "".join(name.rjust(width) for name, width, _ in COLUMNS))
    for name in args.models:
        loaded = load_model(name)
        for context in args.contexts:
            prompts = prompts_for(loaded, args.requests, context, args.seed)
            full = run(loaded, "full", prompts, args.new, audit=False)
            for strategy in args.strategies:
                ours = run(loaded, strategy, prompts, args.new, audit=True)
                row = figures(ours, full, 2 * loaded.head_dim * loaded.dtype.itemsize)
                told = "".join(show(row[column], width, kind) for column, width, kind in COLUMNS)
                print(f"{name:16}{len(prompts[0]):8}  {strategy:22}{told}", flush=True)
                found.append({"model": name, "context": context, "strategy": strategy, **row})
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write_results(args.json or Path(__file__).parent / "results" / f"selection-{date}.json", found, seed=args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
