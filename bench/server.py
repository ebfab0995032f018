"""What HTTP costs: a server against its own engine called directly, with the same requests, taking turns.

Run `python bench/server.py`. This process is `kvwise serve`: its event loop and its engine's thread. One side has the
engine's thread step its engine in a loop, while the server has nothing to do; the other is the client of `kvwise bench`
in a process of its own, which asks the server over HTTP and streams. That both sides have one engine matters: two
processes with equal engines differ by several per cent, for as long as they live.

Workloads: a burst (all requests at once), paced (four times as many, Poisson arrivals at half of that rate), and alone
(one request at a time). Both sides are greedy and get the same prompts, under salts of their own, so that nobody finds
the other's in the cache. The time to the first token is that from the moment at which a request is due, over HTTP from
when it is sent (a client's timer is late by up to 2 ms, which is no matter of the server's), until its first token is
in the caller's hands. Each turn has prompts of its own.

Gates: tokens per second in a burst at least 0.95 of the engine's, median over all bursts; the median time to the first
token at most 5 ms later: of a burst (median over all of them), and of all requests that come paced, or alone. Paced it
spreads most, since a request waits for steps of tens of milliseconds, and has little room on two cores that are shared.
A machine that has other work to do shows in the spread: trust no figure that has a wide one.
"""

import argparse
import asyncio
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch

from asking import Asked, Seen, asking
from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.core.sizes import parse_bytes
from kvwise.engine.engine import Engine
from kvwise.engine.service import EngineService
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.server.context import Server
from kvwise.server.log import logging_to
from kvwise.server.run import run
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.tenants import Tenants
from kvwise.study.arrivals import arrival_times
from machine import write_results

RATIO, LATER_MS = 0.95, 5.0
WORKLOADS = ("burst", "burst", "paced", "paced", "burst", "burst", "alone")  # of a repeat; each side goes first in turn
WARM_UP = ("burst", "alone")
PACED_MORE = 4  # times as many requests: their times to the first token spread most
ALONE_OUTPUT = 16  # tokens of an answer: enough of them to see the first
Side = Callable[[Sequence[Asked], int], Seen]


def directly(asked: Sequence[Asked], num_output: int, engine: Engine) -> Seen:
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
            due[engine.add_request(one.prompt, params, cache_salt="engine")] = one.at
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


def requests(args: argparse.Namespace, turn: int, number: int, rate: float) -> list[Asked]:
    """Unrelated prompts; at rate inf all at once."""
    rng = np.random.default_rng((args.seed, turn))
    times = arrival_times(number, rate, 1.0, rng)
    return [Asked(float(at), rng.integers(32, 127, size=args.input).tolist()) for at in times]


def joined(seen: Sequence[Seen]) -> Seen:
    """Several runs as one."""
    return Seen(
        [x for one in seen for x in one.ttfts], [x for one in seen for x in one.latencies],
        sum(one.num_tokens for one in seen), sum(one.seconds for one in seen),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """What both sides made of one workload of one repeat."""

    workload: str
    repeat: int
    engine: Seen
    http: Seen

    @property
    def ratio(self) -> float:
        """Tokens per second over HTTP, of the engine's."""
        return self.http.rate / self.engine.rate

    @property
    def later_ms(self) -> float:
        """Between the medians of the times to the first token."""
        return (median(self.http.ttfts) - median(self.engine.ttfts)) * 1e3

    def __str__(self) -> str:
        first = "".join(f"{median(side.ttfts) * 1e3:>10.2f}" for side in (self.engine, self.http))
        return (
            f"{self.repeat:>2} {self.workload:6} {self.engine.rate:>9.1f}{self.http.rate:>9.1f}{self.ratio:>7.3f}"
            f"{first}{self.later_ms:>+8.2f}"
        )

    def told(self) -> dict[str, object]:
        """For the file of results."""
        out: dict[str, object] = {"workload": self.workload, "repeat": self.repeat, "ratio": self.ratio}
        for name, side in (("engine", self.engine), ("http", self.http)):
            out |= {
                f"{name}_tokens_per_s": side.rate, f"{name}_ttft_ms": median(side.ttfts) * 1e3,
                f"{name}_e2el_ms": median(side.latencies) * 1e3,
            }  # fmt: skip
        return out | {"later_ms": self.later_ms}


@dataclass(frozen=True, slots=True)
class Later:
    """How much later first tokens come over HTTP, in ms: between the medians, and where 95 % of that may lie."""

    ms: float
    low: float
    high: float


def compare(sides: Sequence[Side], args: argparse.Namespace) -> list[Row]:
    """Both sides, the engine first, on each workload of each repeat."""
    rows: list[Row] = []
    rate, turns = 0.0, count()
    for repeat in range(-1, args.repeats):
        for name in WORKLOADS if repeat >= 0 else WARM_UP:
            turn = next(turns)
            if name == "paced":
                asked = requests(args, turn, PACED_MORE * args.requests, args.load * rate / args.output)
            else:
                asked = requests(args, turn, args.requests, math.inf)
            if name == "alone":
                seen = [in_turn(sides, [one], ALONE_OUTPUT, turn=i) for i, one in enumerate(asked)]
            else:
                seen = [in_turn(sides, asked, args.output, turn=turn)]
            row = Row(name, repeat, *(joined(each) for each in zip(*seen, strict=True)))
            rate = row.engine.rate if name == "burst" else rate
            if repeat >= 0:
                rows.append(row)
                print(row, flush=True)
    return rows


def in_turn(sides: Sequence[Side], asked: Sequence[Asked], num_output: int, *, turn: int) -> list[Seen]:
    """The same requests on each side, one side after the other; every other turn the last one goes first."""
    order = list(range(len(sides)))
    seen = {i: sides[i](asked, num_output) for i in (reversed(order) if turn % 2 else order)}
    return [seen[i] for i in order]


def of(rows: Sequence[Row], workload: str) -> list[Row]:
    """Those of one workload."""
    return [row for row in rows if row.workload == workload]


def later(rows: Sequence[Row], rng: np.random.Generator) -> Later:
    """Of all requests of some rows; the interval is that of 2000 samples of them (Efron's bootstrap, by request)."""
    engine = np.array(joined([row.engine for row in rows]).ttfts) * 1e3
    http = np.array(joined([row.http for row in rows]).ttfts) * 1e3
    drawn = rng.integers(len(engine), size=(2000, len(engine)))
    low, high = np.percentile(np.median(http[drawn], axis=1) - np.median(engine[drawn], axis=1), (2.5, 97.5))
    return Later(float(np.median(http) - np.median(engine)), float(low), float(high))


def serve_and_compare(args: argparse.Namespace) -> list[Row]:
    """Be a server, and compare it with its engine from a thread of its own."""
    length = args.input + args.output + 16
    config = EngineConfig(kv_cache_memory_bytes=parse_bytes(args.kv_memory), max_model_len=length)
    # Connections that the client keeps are not to end just when it uses them again.
    settings = ServerSettings(model_names=[args.model], port=0, keep_alive_s=3600.0)
    found: Future[list[Row]] = Future()

    def load() -> EngineService:
        return EngineService(load_model(args.model), [parse(args.strategy)], config)

    def on_ready(server: Server, url: str) -> None:
        threading.Thread(target=drive, args=(server.service, url, asyncio.get_running_loop()), daemon=True).start()

    def drive(service: EngineService, url: str, loop: asyncio.AbstractEventLoop) -> None:
        def engine_side(asked: Sequence[Asked], num_output: int) -> Seen:
            work = service.call(partial(directly, asked, num_output))
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        try:
            with asking(url, "http") as http_side:
                found.set_result(compare((engine_side, http_side), args))
        except BaseException as error:
            found.set_exception(error)
        os.kill(os.getpid(), signal.SIGTERM)  # the server ends as it always does

    with logging_to():
        run(settings, Tenants.open(settings), load, on_ready)
    return found.result()


def main() -> int:
    """Measure, print, write; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:100m-bench")
    parser.add_argument("--strategy", default="full+prefix")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--load", type=float, default=0.5, help="paced: share of the burst's request rate")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/server-<date>.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.model}, {args.requests} x {args.input} in, {args.output} out, {args.threads} threads")
    print(f"{'':9} {'engine':>9}{'http':>9}{'ratio':>7}{'TTFT ms':>10}{'http':>10}{'later':>8}")
    rows = serve_and_compare(args)
    ratios = [row.ratio for row in of(rows, "burst")]
    ratio = median(ratios)
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"tokens/s over HTTP, burst: {ratio:.3f} of the engine's {spread}, gate {RATIO}")
    rng = np.random.default_rng(args.seed)
    found = {name: later(of(rows, name), rng) for name in ("paced", "alone")}
    in_bursts = median(row.later_ms for row in of(rows, "burst"))
    print(f"TTFT over HTTP, burst: {in_bursts:+.2f} ms median of bursts, gate +{LATER_MS} ms")
    for name, one in found.items():
        interval = f"(95 %: {one.low:+.2f} to {one.high:+.2f})"
        print(f"TTFT over HTTP, {name}: {one.ms:+.2f} ms median {interval}, gate +{LATER_MS} ms")
    path = args.json or Path(__file__).parent / "results" / f"server-{time.strftime('%Y-%m-%d')}.json"
    options = {k: v for k, v in vars(args).items() if k not in ("json", "seed")}
    summary = {
        "ratio": ratio, "later_ms": {"burst": in_bursts, **{name: asdict(one) for name, one in found.items()}},
        "gates": {"ratio": RATIO, "later_ms": LATER_MS},
    }  # fmt: skip
    write_results(path, [row.told() for row in rows], seed=args.seed, **options, **summary)
    print(f"written to {path}")
    broken = [f"tokens/s: {ratio:.3f} is below {RATIO}"] if ratio < RATIO else []
    beyond = {"burst": in_bursts, **{name: one.ms for name, one in found.items()}}
    broken += [f"TTFT, {name}: {ms:+.2f} ms is beyond +{LATER_MS} ms" for name, ms in beyond.items() if ms > LATER_MS]
    for text in broken:
        print(f"GATE: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
