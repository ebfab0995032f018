"""Cost of the cache manager alone: decode steps, keys, matching, admission, taking and releasing blocks.

Run `python bench/manager.py`. Gates: a decode step of 256 sequences <= 100 us, a prefix match <= 400 ns a
block. The rest informs. Medians over interleaved repeats of one run, one thread; rows also go to
bench/out/manager.json.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from kvwise.cache.identity import Identity
from kvwise.cache.manager import CacheManager
from kvwise.core.clock import MonotonicClock
from kvwise.policies.catalogue import make_policy

BLOCK_SIZE = 16
SEED = 0
STEP_GATE_US = 100.0
MATCH_GATE_NS = 400.0

# Another EPYC's figures of vLLM-style Python objects, for orientation; ns per 16-token block.
VLLM_STYLE_NS = {
    "hash, sha256 over pickle": "2,200-3,000",
    "alloc": "122",
    "cache": "589",
    "touch": "305",
    "free": "102",
}


def make_manager(num_blocks: int, max_sequences: int, max_blocks: int) -> CacheManager:
    """A manager with sharing on over a pool of Llama-3.1-8B's page layout (32 layers, 8 KV heads)."""
    identity = Identity(
        model="bench", revision="0", dtype="float16", block_size=BLOCK_SIZE, num_layers=32, num_kv_heads=8,
        head_dim=128, positions="rope",
    )  # fmt: skip
    return CacheManager(
        num_blocks=num_blocks,
        pages_per_block=256,
        block_size=BLOCK_SIZE,
        max_sequences=max_sequences,
        max_blocks_per_sequence=max_blocks,
        sharing=True,
        identity=identity,
        policy=make_policy("lru", num_blocks),
        clock=MonotonicClock(),
    )


def admit(manager: CacheManager, tokens: np.ndarray) -> int:
    """Open a row with the prompt computed and published."""
    keys = manager.keys(tokens)
    row = manager.admit(manager.match(keys, len(tokens)), keys, len(tokens))
    assert manager.reserve(row, len(tokens))
    manager.commit(np.array([row]), np.array([len(tokens)]))
    return row


def decode_steps(num_sequences: int, context: int, num_steps: int, full_pool: bool) -> dict[str, float]:
    """Microseconds of one decode step: reserve_many, keys of blocks that fill (1 row in 16 a step), commit.

    With `full_pool` every new block has to be evicted from old published ones first.
    """
    blocks_each = context // BLOCK_SIZE + num_steps // BLOCK_SIZE + 2
    spare = 0 if full_pool else num_sequences * blocks_each
    manager = make_manager(num_sequences * blocks_each + spare, num_sequences + 1, blocks_each)
    rng = np.random.default_rng(SEED)
    # Contexts differ by a token each, so that a sixteenth of the rows fills a block in every step.
    tokens = rng.integers(0, 128_000, (num_sequences, context + num_steps + BLOCK_SIZE), dtype=np.int32)
    lengths = context + np.arange(num_sequences) % BLOCK_SIZE
    if full_pool:
        fill_with_old_blocks(manager, rng)
    rows = np.array([admit(manager, tokens[i, :n]) for i, n in enumerate(lengths)])
    times: dict[str, list[int]] = {"reserve": [], "keys": [], "commit": [], "step": []}
    for _ in range(num_steps):
        lengths = lengths + 1
        start = perf_counter_ns()
        granted = manager.reserve_many(rows, lengths)
        reserved = perf_counter_ns()
        for i in manager.keyless(rows, lengths).tolist():
            row = int(rows[i])
            manager.extend_keys(row, tokens[i, manager.num_keyed(row) : lengths[i]])
        keyed = perf_counter_ns()
        manager.commit(rows, lengths)
        done = perf_counter_ns()
        assert granted.all()
        for name, span in zip(times, (reserved - start, keyed - reserved, done - keyed, done - start), strict=True):
            times[name].append(span)
    manager.check()
    return {name: float(np.median(spans)) / 1e3 for name, spans in times.items()}


def fill_with_old_blocks(manager: CacheManager, rng: np.random.Generator) -> None:
    """Publish and release unrelated prompts until no block is free."""
    length = (manager.tables.shape[1] - 1) * BLOCK_SIZE
    while manager.usage().num_free:
        left = manager.usage().num_free * BLOCK_SIZE
        manager.release(admit(manager, rng.integers(0, 128_000, min(length, left), dtype=np.int32)))


def per_block(num_blocks: int, repeats: int) -> dict[str, float]:
    """Nanoseconds per block of one prompt: keys, reserve, commit, release; then match and admit, cached."""
    manager = make_manager(2 * num_blocks, 8, num_blocks + 1)
    rng = np.random.default_rng(SEED)
    times: dict[str, list[int]] = {
        "keys": [],
        "match": [],
        "admit": [],
        "reserve": [],
        "commit": [],
        "release": [],
    }

    def timed(name: str, call: Callable[[], object]) -> object:
        start = perf_counter_ns()
        result = call()
        times[name].append(perf_counter_ns() - start)
        return result

    for _ in range(repeats):
        tokens = rng.integers(0, 128_000, num_blocks * BLOCK_SIZE + 1, dtype=np.int32)
        keys = manager.keys(tokens)
        row = manager.admit(manager.match(keys, len(tokens)), keys, len(tokens))
        one, total = np.array([row]), np.array([len(tokens)])
        timed("keys", lambda tokens=tokens: manager.keys(tokens))
        timed("reserve", lambda row=row, tokens=tokens: manager.reserve(row, len(tokens)))
        timed("commit", lambda one=one, total=total: manager.commit(one, total))
        timed("release", lambda row=row: manager.release(row))
        match = timed("match", lambda keys=keys, tokens=tokens: manager.match(keys, len(tokens)))
        assert len(match.blocks) == num_blocks
        row = timed("admit", lambda m=match, k=keys, t=tokens: manager.admit(m, k, len(t)))
        manager.release(row)
    manager.check()
    return {name: float(np.median(spans)) / num_blocks for name, spans in times.items()}


def provenance() -> dict[str, str]:
    """Commit, versions and machine of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or "none",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.processor() or platform.machine(),
        "seed": str(SEED),
    }


def main() -> int:
    """Measure, print, write; exit 1 if a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "manager.json")
    args = parser.parse_args()
    steps = {
        "free blocks left": decode_steps(args.sequences, args.context, args.steps, full_pool=False),
        "pool full, each new block evicts": decode_steps(args.sequences, args.context, args.steps, full_pool=True),
    }
    blocks = {f"{n * BLOCK_SIZE:,} tokens": per_block(n, repeats) for n, repeats in ((128, 60), (2048, 12))}
    print(f"decode step of {args.sequences} sequences, sharing on, us (median of {args.steps})")
    for title, row in steps.items():
        print(f"  {title:34}" + "".join(f"{name} {value:7.1f}   " for name, value in row.items()))
    print("\none prompt, ns per 16-token block (median)")
    for title, row in blocks.items():
        print(f"  {title:34}" + "".join(f"{name} {value:6.0f}   " for name, value in row.items()))
    print("\nvLLM-style, elsewhere, ns a block:   " + "   ".join(f"{k} {v}" for k, v in VLLM_STYLE_NS.items()))
    worst_step = max(row["step"] for row in steps.values())
    worst_match = max(row["match"] for row in blocks.values())
    passed = worst_step <= STEP_GATE_US and worst_match <= MATCH_GATE_NS
    verdict = "pass" if passed else "MISSED"
    print(f"\ngate: step {worst_step:.1f} us <= {STEP_GATE_US:.0f}", end="")
    print(f", match {worst_match:.0f} ns <= {MATCH_GATE_NS:.0f}: {verdict}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"steps_us": steps, "blocks_ns": blocks, **provenance()}, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
