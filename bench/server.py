"""What HTTP costs: `kvwise serve` against the engine called directly, with the same requests, taking turns.

Run `python bench/server.py`. One side is an engine in this process, stepped in a loop; the other a `kvwise serve` of
its own process with equal settings, asked over HTTP with streaming by the client of `kvwise bench`. Workloads: a burst
(all requests at once), paced (Poisson arrivals at half of the burst's rate), and alone (one request at a time). The
time to the first token is that from the moment at which a request is due until its first token is in the caller's
hands. Each repeat has prompts of its own; sides go first in turn, alone with every request. Gates, each a median over
repeats: tokens per second at least 0.95 of the engine's in the burst; the median time to the first token at most 5 ms
later, paced and alone. A machine that has other work to do shows in the spread: trust no figure that has a wide one.
"""

import argparse
import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.core.sizes import parse_bytes
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.study.arrivals import arrival_times
from kvwise.study.client.load import Load, Sender
from kvwise.study.client.options import Target
from kvwise.study.client.prompts import Ask, Conversation
from kvwise.study.client.wire import Wire, open_wire
from machine import write_results
from serving import serving

RATIO, LATER_MS = 0.95, 5.0


@dataclass(frozen=True)
class Asked:
    """One request: when it is due, in seconds from the start, and its token ids."""

    at: float
    prompt: list[int]


@dataclass(frozen=True)
class Seen:
    """What one side made of a workload."""

    ttfts: list[float]
    latencies: list[float]
    num_tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds


def directly(engine: Engine, asked: Sequence[Asked], num_output: int) -> Seen:
    """Add requests when they are due and step until all have ended."""
    params = SamplingParams(max_tokens=num_output, ignore_eos=True)
    waiting, start = deque(asked), time.perf_counter()
    due: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    num_tokens = 0
    while waiting or engine.has_unfinished():
        now = time.perf_counter() - start
        while waiting and waiting[0].at <= now:
            one = waiting.popleft()
            due[engine.add_request(one.prompt, params)] = one.at
        if not engine.has_unfinished():
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            num_tokens += len(output.new_token_ids)
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
    took = time.perf_counter() - start
    return Seen([first[i] - at for i, at in due.items()], [last[i] - at for i, at in due.items()], num_tokens, took)


class Http:
    """The other side: a client of the server, whose connections stay open."""

    def __init__(self, runner: asyncio.Runner, wire: Wire) -> None:
        self._runner = runner
        self._wire = wire

    def __call__(self, asked: Sequence[Asked], num_output: int) -> Seen:
        """Send requests when they are due and wait for all answers. RuntimeError if one fails."""
        talks = [
            Conversation(i, one.at, (Ask(partial(list, one.prompt), len(one.prompt), num_output),))
            for i, one in enumerate(asked)
        ]
        load = Load(talks, Sender(self._wire.body, self._wire.send, is_chat=False))
        outcome = self._runner.run(load.run())
        failed = next((answer.error for answer in outcome.answers if not answer.ok), None)
        if failed is not None:
            raise RuntimeError(failed)
        answers = sorted(outcome.answers, key=lambda answer: answer.conversation)
        late = [a.start - a.scheduled for a in answers]
        return Seen(
            [a.ttft + more for a, more in zip(answers, late, strict=True)],
            [a.latency + more for a, more in zip(answers, late, strict=True)],
            sum(a.num_output for a in answers),
            outcome.duration_s,
        )


@contextmanager
def http_side(url: str) -> Iterator[Http]:
    """A client on an event loop of its own."""
    with asyncio.Runner() as runner:
        opened = open_wire(Target(url, ignore_eos=True, extra_body={"temperature": 0}))  # as the engine's default
        wire = runner.run(opened.__aenter__())
        try:
            runner.run(wire.find_model())
            yield Http(runner, wire)
        finally:
            runner.run(opened.__aexit__(None, None, None))


def requests(args: argparse.Namespace, seed: int, rate: float, count: int) -> list[Asked]:
    """Unrelated prompts; at rate inf all at once."""
    rng = np.random.default_rng((args.seed, seed))
    times = arrival_times(count, rate, 1.0, rng)
    return [Asked(float(at), rng.integers(32, 127, size=args.input).tolist()) for at in times]


def compare(engine: Engine, http: Http, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row per workload and repeat."""
    rows: list[dict[str, object]] = []
    rate = 0.0
    for repeat in range(-1, args.repeats):  # the first one warms up
        for number, name in enumerate(("burst", "paced", "alone")):
            speed = args.load * rate / args.output if name == "paced" else math.inf
            asked = requests(args, 3 * repeat + number + 3, speed, args.requests)
            groups = [[one] for one in asked] if name == "alone" else [asked]
            seen = [both(engine, http, group, args.output, http_first=(repeat + i) % 2 == 1)
                    for i, group in enumerate(groups)]  # fmt: skip
            one, other = (joined([pair[side] for pair in seen]) for side in (0, 1))
            rate = one.rate if name == "burst" else rate
            if repeat >= 0:
                rows.append(row(name, repeat, one, other))
    return rows


def both(
    engine: Engine, http: Http, asked: Sequence[Asked], num_output: int, *, http_first: bool
) -> tuple[Seen, Seen]:  # fmt: skip
    """The same requests on both sides, one after the other: (engine, HTTP)."""
    if http_first:
        other = http(asked, num_output)
        return directly(engine, asked, num_output), other
    return directly(engine, asked, num_output), http(asked, num_output)


def joined(seen: Sequence[Seen]) -> Seen:
    """Several runs as one."""
    return Seen(
        [x for one in seen for x in one.ttfts], [x for one in seen for x in one.latencies],
        sum(one.num_tokens for one in seen), sum(one.seconds for one in seen),
    )  # fmt: skip


def row(name: str, repeat: int, one: Seen, other: Seen) -> dict[str, object]:
    """Figures of one workload, printed."""
    ttfts = [median(side.ttfts) * 1e3 for side in (one, other)]
    latencies = [median(side.latencies) * 1e3 for side in (one, other)]
    paired = median(b - a for a, b in zip(one.ttfts, other.ttfts, strict=True)) * 1e3
    print(f"{repeat:>2} {name:6} {one.rate:>9.1f}{other.rate:>9.1f}{other.rate / one.rate:>7.3f}"
          f"{ttfts[0]:>10.2f}{ttfts[1]:>10.2f}{ttfts[1] - ttfts[0]:>8.2f}{paired:>8.2f}", flush=True)  # fmt: skip
    return {
        "workload": name, "repeat": repeat, "engine_tokens_per_s": one.rate, "http_tokens_per_s": other.rate,
        "ratio": other.rate / one.rate, "engine_ttft_ms": ttfts[0], "http_ttft_ms": ttfts[1],
        "later_ms": ttfts[1] - ttfts[0], "paired_later_ms": paired,
        "engine_e2el_ms": latencies[0], "http_e2el_ms": latencies[1],
    }  # fmt: skip


def spread(rows: Sequence[dict[str, object]], workload: str, key: str) -> tuple[float, float, float]:
    """Median, smallest and largest over repeats."""
    values = sorted(float(str(row[key])) for row in rows if row["workload"] == workload)
    return median(values), values[0], values[-1]


def main() -> int:
    """Measure, print, write; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:100m-bench")
    parser.add_argument("--strategy", default="full+prefix")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--load", type=float, default=0.5, help="paced: share of the burst's request rate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/server-<date>.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length = args.input + args.output + 16
    options = ("--strategy", args.strategy, "--kv-cache-memory-bytes", args.kv_memory, "--max-model-len", str(length))
    config = EngineConfig(kv_cache_memory_bytes=parse_bytes(args.kv_memory), max_model_len=length)
    print(f"{args.model}, {args.requests} x {args.input} in, {args.output} out, {args.threads} threads")
    print(f"{'':9} {'engine':>9}{'http':>9}{'ratio':>7}{'TTFT ms':>10}{'http':>10}{'later':>8}{'paired':>8}")
    engine = Engine(load_model(args.model), parse(args.strategy), config)
    with serving(args.model, options, threads=args.threads) as served, http_side(served.url) as http:
        rows = compare(engine, http, args)
    engine.close()
    ratio = spread(rows, "burst", "ratio")
    later = {name: spread(rows, name, "later_ms") for name in ("paced", "alone")}
    print(f"tokens/s over HTTP, burst: {ratio[0]:.3f} of the engine's ({ratio[1]:.3f} to {ratio[2]:.3f}), gate {RATIO}")
    for name, (middle, low, high) in later.items():
        print(f"TTFT over HTTP, {name}: {middle:+.2f} ms median ({low:+.2f} to {high:+.2f}), gate +{LATER_MS} ms")
    path = args.json or Path(__file__).parent / "results" / f"server-{time.strftime('%Y-%m-%d')}.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "seed")}
    write_results(path, rows, seed=args.seed, **settings, gates={"ratio": RATIO, "later_ms": LATER_MS})
    print(f"written to {path}")
    broken = [f"tokens/s: {ratio[0]:.3f} is below {RATIO}"] if ratio[0] < RATIO else []
    broken += [f"TTFT, {name}: {found[0]:+.2f} ms is more than +{LATER_MS} ms"
               for name, found in later.items() if found[0] > LATER_MS]  # fmt: skip
    for text in broken:
        print(f"GATE: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
