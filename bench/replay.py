"""Speed of the trace replay: block operations a second through the book of one tier, by policy.

Run `python bench/replay.py [TRACE.jsonl.gz]`; without a trace, synthetic conversations. An operation is a look-up
(every block visited until the first miss) or a touch or insertion (every block of every request, once). Gate: 200,000
a second for a tier without limit, `lru`, `fifo` and a TTL. The other policies are fed one insertion at a time, since
their newest blocks may be the next to leave; they inform. Best of the repeats of one run, in seconds of processor time
of the one thread; rows also go to bench/out/replay.json.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from time import process_time

import numpy as np

from kvwise.policies.catalogue import policies
from kvwise.study.replay import belady, replay
from kvwise.study.traces import TraceRequest, read_trace

SEED = 0
GATE = 200_000.0
BLOCK_SIZE = 512


def conversations(num_requests: int) -> list[TraceRequest]:
    """Sessions that grow by a few blocks a turn, 120 at a time, each ending at 60 blocks."""
    rng = np.random.default_rng(SEED)
    next_id, requests = 0, []
    chats: list[list[int]] = [[] for _ in range(120)]
    for number in range(num_requests):
        which = int(rng.integers(len(chats)))
        if len(chats[which]) > 60:
            chats[which] = []
        grown = int(rng.integers(1, 12))
        chats[which] = chats[which] + list(range(next_id, next_id + grown))
        next_id += grown
        hash_ids = tuple(chats[which])
        requests.append(TraceRequest(number * 0.3, len(hash_ids) * BLOCK_SIZE, 1, hash_ids))
    return requests


def rate(requests: list[TraceRequest], policy: str, capacity: int | None, ttl_s: float | None, repeats: int) -> float:
    """Operations a second, best of the repeats."""
    best = 0.0
    for _ in range(repeats):
        start = process_time()
        if policy == "belady" and capacity is not None:
            result = belady(requests, capacity)
        else:
            result = replay(requests, policy, capacity, ttl_s)
        best = max(best, result.num_operations / (process_time() - start))
    return best


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
    """Measure, print, write; exit 1 if the gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--capacity", type=int, default=1000)
    parser.add_argument("--ttl", type=float, default=300.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "replay.json")
    args = parser.parse_args()
    requests = read_trace(args.trace) if args.trace else conversations(1500)
    cases: dict[str, tuple[str, int | None, float | None]] = {
        "no limit": ("lru", None, None),
        f"no limit, TTL {args.ttl:.0f} s": ("lru", None, args.ttl),
        "lru": ("lru", args.capacity, None),
        f"lru, TTL {args.ttl:.0f} s": ("lru", args.capacity, args.ttl),
        "fifo": ("fifo", args.capacity, None),
    }
    gated = {name: rate(requests, *case, args.repeats) for name, case in cases.items()}
    others = [*sorted(set(policies()) - {"lru", "fifo"}), "belady"]
    informing = {name: rate(requests, name, args.capacity, None, 1) for name in others}
    what = args.trace.name if args.trace else "synthetic conversations"
    print(f"{what}: {len(requests):,} requests; a tier of {args.capacity:,} blocks; block operations a second")
    for name, value in (gated | informing).items():
        print(f"  {name:22}{value:12,.0f}{'' if name in gated else '   (informs)'}")
    worst = min(gated.values())
    print(f"\ngate: {worst:,.0f} >= {GATE:,.0f}: {'pass' if worst >= GATE else 'MISSED'}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = {"trace": what, "capacity": args.capacity, "gated": gated, "informing": informing, **provenance()}
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if worst >= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
