"""Ten times overload: what a server makes of ten times the requests that it can answer.

Run `python bench/overload.py`. Starts `kvwise serve`, finds its best goodput with more and more requests at a time
(closed loop), then offers ten times the rate of that, whatever becomes of them (open loop), for a minute. A request is
good if it keeps `--goodput`; without it the limits are ten times what a request alone takes to its first token and
three times what it then takes per token (but at least 1 s and 50 ms). Goodput counts requests that end in the window
without its first seconds, in the sweep as in the overload. Gates: refusals (429, 503) decided within 50 ms at the 99th
percentile, all with Retry-After; goodput at least 0.8 of the best; no leaked block; resident memory that grows by less
than 1 % a minute (a line through the second half). What waits at most is a setting: `--max-waiting` requests more than
those that run must be servable within the limit of the first token.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvwise.study.client.answer import Answer
from kvwise.study.client.datasets import conversations
from kvwise.study.client.figures import LATE_MS, Figures, figures, is_good
from kvwise.study.client.load import Outcome
from kvwise.study.client.options import Target, Traffic, Wanted
from kvwise.study.client.prompts import Maker
from kvwise.study.client.run import load
from kvwise.study.client.vocabulary import Common
from kvwise.study.client.wire import Wire, open_wire
from machine import write_results
from serving import Served, serving

REFUSAL_MS, SHARE, GROWTH = 50.0, 0.8, 0.01
_PATIENCE_S = 30.0  # after the load, for the server to come to rest


@dataclass(frozen=True)
class Sample:
    """The server at one moment of the overload: seconds from its start, bytes, and how long /health took."""

    at: float
    rss: int
    health_s: float


async def play(wire: Wire, traffic: Traffic) -> Outcome:
    """Send some traffic and wait for what becomes of it."""
    return await load(wire, traffic, conversations(traffic, Maker(Common(), is_chat=False))).run()


def steady(outcome: Outcome, wanted: Wanted, begin: float, end: float) -> float:
    """Good requests per second among those that ended between two moments after the start."""
    ends = [a.start + a.latency - outcome.started for a in outcome.answers if a.ok and is_good(a, wanted)]
    return sum(begin <= at < end for at in ends) / (end - begin)


async def limits(wire: Wire, traffic: Traffic) -> dict[str, float]:
    """What a good request may take, in ms, from what one alone takes."""
    await play(wire, replace(traffic, num_prompts=3, max_concurrency=1, seed=1))
    outcome = await play(wire, replace(traffic, num_prompts=8, max_concurrency=1, seed=2))
    alone = figures(outcome, Wanted())
    if not alone["completed"]:
        raise RuntimeError(f"no request succeeded: {outcome.answers[0].error}")
    first, each = (float(str(alone[f"median_{name}_ms"])) for name in ("ttft", "tpot"))
    return {"ttft": max(1000.0, 10 * first), "tpot": max(50.0, 3 * each)}


async def sweep(wire: Wire, traffic: Traffic, wanted: Wanted, args: argparse.Namespace) -> list[dict[str, object]]:
    """Goodput with 1, 2, 4, ... requests at a time, until it has fallen twice."""
    rows: list[dict[str, object]] = []
    at_a_time, fallen, best = 1, 0, 0.0
    while fallen < 2 and at_a_time <= args.most:
        seen = replace(traffic, max_concurrency=at_a_time, duration_s=args.sweep, num_prompts=5000, seed=10 + at_a_time)
        outcome = await play(wire, seen)
        goodput = steady(outcome, wanted, args.settle, args.sweep)
        rate = steady(outcome, Wanted(), args.settle, args.sweep)
        rows.append({"phase": "sweep", "at_a_time": at_a_time, "goodput": goodput, "request_rate": rate})
        print(f"{at_a_time:>4} at a time: {goodput:6.2f} good of {rate:6.2f} requests/s", flush=True)
        fallen = 0 if goodput > best else fallen + 1
        best = max(best, goodput)
        at_a_time *= 2
    return rows


async def watch(served: Served, wire: Wire, samples: list[Sample]) -> None:
    """Note memory and /health every half second."""
    start = time.perf_counter()
    while True:
        asked = time.perf_counter()
        await wire.look()
        samples.append(Sample(asked - start, served.rss(), time.perf_counter() - asked))
        await asyncio.sleep(0.5)


async def overload(
    served: Served, wire: Wire, traffic: Traffic, rate: float, seconds: float
) -> tuple[Outcome, list[Sample]]:  # fmt: skip
    """Offer `rate` requests per second for some time."""
    samples: list[Sample] = []
    watching = asyncio.create_task(watch(served, wire, samples))
    count = round(rate * seconds)
    outcome = await play(wire, replace(traffic, rate=rate, num_prompts=count, duration_s=seconds, seed=99))
    watching.cancel()
    return outcome, samples


def growth(samples: Sequence[Sample], seconds: float) -> float:
    """Share by which resident memory grows a minute, by a line through the second half of the load."""
    half = [s for s in samples if seconds / 2 <= s.at <= seconds]
    if len(half) < 3:
        return float("nan")
    slope, _ = np.polyfit([s.at for s in half], [s.rss for s in half], 1)
    return float(slope * 60 / np.mean([s.rss for s in half]))


def at_rest(served: Served) -> dict[str, float]:
    """Metrics once nothing runs any more."""
    give_up = time.perf_counter() + _PATIENCE_S
    while True:
        found = served.metrics()
        busy = found["num_requests_running"] + found["num_requests_waiting"] + found["kv_leaked_blocks"]
        if not busy or time.perf_counter() > give_up:
            return found
        time.sleep(0.5)


async def measure(
    served: Served, args: argparse.Namespace
) -> tuple[list[dict[str, object]], Outcome, list[Sample], Wanted]:  # fmt: skip
    """The sweep's rows and then the overload."""
    traffic = Traffic(input_len=args.input, output_len=args.output)
    async with open_wire(Target(served.url, ignore_eos=True, timeout_s=300)) as wire:
        await wire.find_model()
        levels = dict(part.split(":") for part in args.goodput) or await limits(wire, traffic)
        wanted = Wanted({name: float(value) for name, value in levels.items()})
        print("good:", ", ".join(f"{name} up to {limit:.0f} ms" for name, limit in wanted.goodput.items()))
        rows = await sweep(wire, traffic, wanted, args)
        rate = args.times * max(float(str(row["request_rate"])) for row in rows)
        print(f"offering {rate:.1f} requests/s for {args.seconds:g} s", flush=True)
        outcome, samples = await overload(served, wire, traffic, rate, args.seconds)
    rows.append({"phase": "overload", "offered": rate})
    return rows, outcome, samples, wanted


def judge(
    best: float, goodput: float, found: Figures, grown: float, metrics: dict[str, float]
) -> list[str]:  # fmt: skip
    """The gates that do not hold."""
    refusal = float(str(found["p99_refusal_ms"]))
    return [text for text, bad in (
        (f"refusals take {refusal:.1f} ms at the 99th percentile, {REFUSAL_MS:g} may", refusal > REFUSAL_MS),
        (f"{found['refused_without_retry_after']} refusals without Retry-After", found["refused_without_retry_after"]),
        (f"goodput is {goodput / best:.2f} of the best, below {SHARE}", goodput < SHARE * best),
        (f"memory grows by {grown:.1%} a minute", grown > GROWTH),
        (f"{metrics['kv_leaked_blocks']:.0f} leaked blocks", metrics["kv_leaked_blocks"]),
        (f"failed otherwise: {others(found)}", others(found)),
    ) if bad]  # fmt: skip


def others(found: Figures) -> dict[str, int]:
    """Errors that are no refusals, by kind."""
    kinds: dict[str, int] = found["errors_by_kind"]  # type: ignore[assignment]
    return {kind: count for kind, count in kinds.items() if kind not in ("http_429", "http_503")}


def tell(outcome: Outcome, found: Figures, samples: Sequence[Sample], best: float, goodput: float) -> None:
    """Print what the overload brought."""
    sent: list[Answer] = outcome.answers
    print(f"{len(sent)} requests: {found['completed']} completed, {found['refused']} refused, other {others(found)}")
    print(f"time to refuse: {found['median_refusal_ms']:.2f} ms median, {found['p99_refusal_ms']:.2f} ms p99")
    prompt = [a.decision_s * 1e3 for a in sent if a.decision_s is not None and a.send_delay_s * 1e3 <= LATE_MS]
    if prompt:
        print(f"of those {len(prompt)} that the client sent on time: {np.percentile(prompt, 99):.2f} ms p99")
    print(f"goodput: {goodput:.2f} requests/s, {goodput / best:.2f} of the best ({best:.2f})")
    print(f"TTFT of completed: {found['median_ttft_ms']:.0f} ms median, {found['p99_ttft_ms']:.0f} ms p99")
    sizes = [sample.rss / 2**20 for sample in samples]
    print(f"resident: {sizes[0]:.0f} MiB first, {max(sizes):.0f} at most, {sizes[-1]:.0f} last")
    print(f"/v1/models answered within {max(s.health_s for s in samples) * 1e3:.0f} ms all the time")
    print(f"the client sent at most {found['max_send_delay_ms']:.1f} ms late")


def main() -> int:
    """Measure, print, write; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:13m")
    parser.add_argument("--strategy", default="full+prefix")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--times", type=float, default=10.0, help="the best request rate")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--sweep", type=float, default=8.0, help="seconds for each step of the sweep")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds at the beginning that do not count")
    parser.add_argument("--most", type=int, default=64, help="requests at a time, in the sweep")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-waiting", type=int, default=8)
    parser.add_argument("--goodput", nargs="*", default=[], help="limits in ms, such as ttft:1000 tpot:100")
    parser.add_argument("--kv-memory", default="64MiB", help="small: the sweep touches all of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/overload-<date>.json)")
    args = parser.parse_args()
    options = ["--strategy", args.strategy, "--kv-cache-memory-bytes", args.kv_memory,
               "--max-num-seqs", str(args.max_num_seqs), "--max-waiting", str(args.max_waiting)]  # fmt: skip
    with serving(args.model, options, threads=args.threads) as served:
        rows, outcome, samples, wanted = asyncio.run(measure(served, args))
        metrics = at_rest(served)
    found = figures(outcome, wanted)
    best = max(float(str(row["goodput"])) for row in rows if row["phase"] == "sweep")
    goodput, grown = steady(outcome, wanted, args.settle, args.seconds), growth(samples, args.seconds)
    tell(outcome, found, samples, best, goodput)
    print(f"memory grows by {grown:.2%} a minute; leaked blocks: {metrics['kv_leaked_blocks']:.0f}")
    rows[-1] |= {key: value for key, value in found.items() if not isinstance(value, list)}
    rows[-1] |= {"goodput": goodput, "share": goodput / best, "growth_a_minute": grown,
                 "leaked_blocks": metrics["kv_leaked_blocks"], "rss": [[s.at, s.rss] for s in samples]}  # fmt: skip
    path = args.json or Path(__file__).parent / "results" / f"overload-{time.strftime('%Y-%m-%d')}.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "goodput")}
    write_results(path, rows, seed=0, **settings, good=dict(wanted.goodput))
    print(f"written to {path}")
    broken = judge(best, goodput, found, grown, metrics)
    for text in broken:
        print(f"GATE: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
