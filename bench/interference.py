"""What storing and loading KV costs those that decode: throughput of running requests beside a transfer, and without.

Run `python bench/interference.py` on a quiet machine (3 minutes). A batch of requests decodes. Beside it comes, every
so often, one more request with a long prefix, of which only the last tokens are computed:

* *neither*: its prefix is on the device, and below already: nothing moves;
* *store*: its prefix is on the device, and is now written down to the tier (`store_after=2`);
* *load*: its prefix is in the tier only, and is brought back.

The link is throttled so that one transfer follows another without a gap, at `--speed` in both directions; all three
have the same requests at the same times. They take turns, *neither* first and last; the ratio is that of tokens per
second of the decoding requests to the mean of the two *neither* beside them. Gate: the median is at least 0.95.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.core.sizes import parse_link
from kvwise.core.tiering import parse_tier
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.build import link_names
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from machine import write_results

GATE = 0.95
SEED = 0
NUM_KNOWN = 4  # prompts that are on the device and below


@dataclass
class Window:
    """One measurement: decoded tokens, seconds, and how many blocks moved meanwhile."""

    tokens: int = 0
    seconds: float = 0.0
    stored: int = 0
    loaded: int = 0
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Bench:
    """One engine over one tier, and the prompts that come beside the decoding batch."""

    def __init__(self, loaded: LoadedModel, tier: str, given: argparse.Namespace) -> None:
        self.given = given
        token_bytes = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * 4
        speed = parse_link(f"a:b={given.speed}")[1]
        self.every_s = given.prefix * token_bytes / speed
        self.num_beside = int(given.window / self.every_s) + 1
        spec = parse_tier(tier)
        tokens = (2 * self.num_beside + NUM_KNOWN + 2) * (given.prefix + 32) + given.batch * (given.context + 4096)
        config = EngineConfig(
            tiers=(spec,),
            kv_cache_memory_bytes=tokens * token_bytes,
            max_num_seqs=given.batch + 8,
            store_after=2,
            store_min_tokens=given.prefix,
            links=dict.fromkeys(link_names([spec]), speed),
        )
        self.engine = Engine(loaded, parse("full+prefix+load"), config)
        self.rng = np.random.default_rng(SEED)
        self.vocab = loaded.vocab_size
        self.known = self.draw(NUM_KNOWN)
        for _ in range(2):  # computed, then stored
            self.compute(self.known)
        self.flush()

    def draw(self, count: int) -> list[list[int]]:
        """Prompts of the prefix's length."""
        return [self.rng.integers(0, self.vocab, self.given.prefix).tolist() for _ in range(count)]

    def compute(self, prompts: Sequence[list[int]]) -> None:
        """Serve prompts with nothing beside them."""
        for prompt in prompts:
            self.engine.add_request(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
            while self.engine.has_unfinished():
                self.engine.step()

    def flush(self) -> None:
        """Wait until nothing is on its way down."""
        assert self.engine.memory.hierarchy is not None
        assert self.engine.memory.hierarchy.flush(120.0)

    def round(self) -> dict[str, Window]:
        """All sides once, over prompts that nobody has seen."""
        fresh = self.draw(self.num_beside)
        self.compute(fresh)  # once: on the device, not below
        out = {"first": self.window(self.known), "store": self.window(fresh)}
        self.flush()
        self.engine.memory.cache.clear()
        self.compute(self.known)  # they come back from below
        out["load"] = self.window(fresh)
        out["last"] = self.window(self.known)
        self.engine.memory.cache.clear()
        self.compute(self.known)
        return out

    def window(self, prompts: Sequence[list[int]]) -> Window:
        """Decode a fresh batch for the window's seconds, with one of `prompts` beside it every so often."""
        engine, given = self.engine, self.given
        many = SamplingParams(max_tokens=4000, ignore_eos=True)
        batch = {
            engine.add_request(self.rng.integers(0, self.vocab, given.context).tolist(), many)
            for _ in range(given.batch)
        }
        seen: set[str] = set()
        while len(seen) < len(batch):
            seen |= {o.request_id for o in engine.step() if o.request_id in batch}
        out, before, beside = Window(), self.moved(), 0
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < given.window:
            if now >= beside * self.every_s:
                prompt = prompts[beside % len(prompts)]
                engine.add_request(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
                beside += 1
            out.tokens += sum(len(o.new_token_ids) for o in engine.step() if o.request_id in batch)
        out.seconds = time.perf_counter() - began
        out.stored, out.loaded = (b - a for a, b in zip(before, self.moved(), strict=True))
        for name in batch:
            engine.abort(name)
        while engine.has_unfinished():
            engine.step()
        return out

    def moved(self) -> tuple[int, int]:
        """Blocks stored and loaded so far."""
        assert self.engine.memory.hierarchy is not None
        stats = self.engine.memory.hierarchy.stats()[0]
        return stats.num_stored, stats.num_loaded


def measure(loaded: LoadedModel, name: str, tier: str, given: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one tier: each round's ratios."""
    bench, rows = Bench(loaded, tier, given), list[dict[str, object]]()
    try:
        for i in range(given.repeats):
            sides = bench.round()
            alone = fmean([sides["first"].rate, sides["last"].rate])
            for side in ("store", "load"):
                window = sides[side]
                moved = window.stored if side == "store" else window.loaded
                if not moved:
                    raise RuntimeError(f"{name}: nothing was moved while {side} was measured")
                rows.append({"tier": name, "side": side, "round": i, "tokens_per_s": window.rate, "alone": alone,
                             "ratio": window.rate / alone, "blocks": moved,
                             "drift": sides["last"].rate / sides["first"].rate})  # fmt: skip
    finally:
        bench.engine.close()
    return rows


def main() -> int:
    """Measure, print, write; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:13m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="prompt tokens of those that decode")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of the request beside them")
    parser.add_argument("--speed", default="100MB/s", help="of the link, both directions")
    parser.add_argument("--window", type=float, default=2.0, help="seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / f"interference-{time.strftime('%F')}.json"
    parser.add_argument("--out", type=Path, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.model)
    folder = Path(tempfile.mkdtemp(prefix="kvwise-interference-"))
    rows: list[dict[str, object]] = []
    broken = []
    try:
        for name, tier in (("host", "host(size=2GiB)"), ("disk", f"disk(path={folder}, size=8GiB)")):
            found = measure(loaded, name, tier, given)
            rows += found
            for side in ("store", "load"):
                mine = [row for row in found if row["side"] == side]
                each = sorted(float(str(row["ratio"])) for row in mine)
                middle = median(each)
                print(f"{side:5} {name}: decode at {middle:.3f} of its speed alone ({each[0]:.3f} to {each[-1]:.3f}), "
                      f"{mine[0]['blocks']} blocks moved in {given.window:g} s", flush=True)  # fmt: skip
                broken += [f"{side} {name}: {middle:.3f} is below {GATE}"] if middle < GATE else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    drift = [abs(float(str(row["drift"])) - 1) for row in rows]
    print(f"spread of the machine itself: last over first, alone, is off by {median(drift):.3f} in the median")
    write_results(given.out, rows, seed=SEED, **{k: v for k, v in vars(given).items() if k != "out"}, gate=GATE)
    print(f"written to {given.out}")
    for text in broken:
        print(f"GATE: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
