"""Paged attention against the memory it must read, and against torch on contiguous KV.

    python bench/attention.py                                        # everything that fits, and the gates
    python bench/attention.py --contexts 16k --batches 8 --shapes d128 --dtypes bfloat16 float16
    python bench/attention.py --part prefill --contexts 8k

Decode: one query per sequence over pages scattered as an engine leaves them; enough layers are allocated that no call
finds its KV in a cache. Gates (16k context, batch 8, half precision, D 128, 32/8 heads, 2 threads): at least 0.45 of
the measured read bandwidth, at least 4x torch SDPA on contiguous float32, mass at most +15 %.
Prefill: a causal prompt; the gate is SDPA's speed. All sides take turns in one run; times are medians with half the
distance between quartiles, ratios are medians over the repeats. Rows also go to bench/results/attention.json.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvwise.kernels import Kernels, Segment, available_kernels, kernels_for
from kvwise.tiers.memory import allocate
from machine import CPU, ReadBandwidth, write_results

BLOCK_SIZE = 16
SEED = 0
SHAPES = {"d128": (128, 32, 8), "d64": (64, 12, 4)}  # head dim, query heads, KV heads
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_BYTES = 256 << 20  # KV of all layers together is at least this, so that caches cannot hold it
BANDWIDTH_GATE, SDPA_GATE, MASS_GATE, PREFILL_GATE = 0.45, 4.0, 0.15, 1.0

Side = Callable[[int], object]  # called with the number of the repeat


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    shape: str
    dtype: str
    context: int
    batch: int

    @property
    def layer_bytes(self) -> int:
        """K and V of one layer: what one call must read."""
        dim, _, heads = SHAPES[self.shape]
        return 2 * self.batch * self.context * heads * dim * DTYPES[self.dtype].itemsize

    @property
    def num_layers(self) -> int:
        """Layers that share the arenas."""
        return max(2, math.ceil(CACHE_BYTES / self.layer_bytes))

    def needed_bytes(self, contiguous: bool) -> int:
        """All arenas, mass columns and, for torch's sides, contiguous float32 KV plus one gathered copy."""
        dim, _, heads = SHAPES[self.shape]
        slots = self.batch * self.context * heads
        paged = self.num_layers * (self.layer_bytes + 4 * slots)
        return paged + (self._num_copies + 2) * 2 * slots * dim * 4 if contiguous else paged

    @property
    def _num_copies(self) -> int:
        """Contiguous float32 copies, taken in turn for the same reason as layers."""
        dim, _, heads = SHAPES[self.shape]
        return max(1, math.ceil(CACHE_BYTES / (2 * self.batch * self.context * heads * dim * 4)))


class Pages:
    """Arenas of all layers, tables in random order, one query per sequence."""

    def __init__(self, setting: Setting) -> None:
        dim, self.num_query_heads, self.heads = SHAPES[setting.shape]
        self.setting = setting
        torch.manual_seed(SEED)
        width = setting.context // BLOCK_SIZE
        num_blocks = setting.batch * width
        self.stride = setting.num_layers * self.heads
        shape = (num_blocks * self.stride, BLOCK_SIZE, dim)
        self.keys, self.values = (_noise(allocate(shape, DTYPES[setting.dtype], CPU)) for _ in range(2))
        self.mass = allocate(shape[:2], torch.float32, CPU)
        self.tables = torch.randperm(num_blocks, dtype=torch.int32).view(setting.batch, width)
        self.lengths = torch.full((setting.batch,), setting.context, dtype=torch.int32)
        self.queries = torch.randn(setting.batch, self.num_query_heads, dim)
        self.query_start = torch.arange(setting.batch + 1, dtype=torch.int32)
        self.scale = dim**-0.5
        self._turns = itertools.count()  # no side may find in a cache what another has just read

    def segment(self, layer: int, mass: bool) -> Segment:
        """What one call attends to."""
        return Segment(
            self.keys,
            self.values,
            self.tables,
            self.lengths,
            num_kv_heads=self.heads,
            page_stride=self.stride,
            page_offset=layer * self.heads,
            mass=self.mass if mass else None,
        )

    def attend(self, kernels: Kernels, mass: bool) -> Side:
        """A call of these kernels, on another layer each time."""

        def side(_: int) -> object:
            segment = self.segment(next(self._turns) % self.setting.num_layers, mass)
            return kernels.attend(self.queries, self.query_start, [segment], scale=self.scale)

        return side

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """Float32 KV [B, H, S, D] of one layer: what a user of plain torch would have to gather first."""
        pages = self.tables.long()[:, None] * self.stride + layer * self.heads + torch.arange(self.heads)[:, None]
        keys, values = (arena[pages].flatten(2, 3).float() for arena in (self.keys, self.values))
        return keys, values


def _noise(arena: Tensor) -> Tensor:
    """Random numbers, cheaply: one random page-sized run repeated."""
    flat = arena.view(-1)
    run = torch.randn(min(flat.numel(), 1 << 20)).to(arena.dtype)
    for start in range(0, flat.numel(), run.numel()):
        part = flat[start : start + run.numel()]
        part.copy_(run[: part.numel()])
    return arena


def torch_sides(pages: Pages) -> dict[str, Side]:
    """torch on contiguous float32 KV, and the same behind a gather of the pages."""
    copies = pages.setting._num_copies
    held = [tuple(x.clone() for x in pages.contiguous(i % pages.setting.num_layers)) for i in range(copies)]
    queries = pages.queries[:, :, None]
    grouped = pages.queries.unflatten(1, (pages.heads, -1))

    def sdpa_of(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(queries, keys, values, scale=pages.scale, enable_gqa=True)

    def sdpa(repeat: int) -> object:
        return sdpa_of(*held[repeat % copies])

    def bmm(repeat: int) -> object:
        keys, values = held[repeat % copies]
        probs = torch.softmax(grouped @ keys.transpose(2, 3) * pages.scale, dim=-1)
        return probs @ values

    def gather(repeat: int) -> object:
        return sdpa_of(*pages.contiguous(repeat % pages.setting.num_layers))

    return {"sdpa": sdpa, "bmm": bmm, "gather+sdpa": gather}


def take_turns(sides: dict[str, Side], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each repeat of each side, interleaved; stops early (after 3) when the time is up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(0)
    stop = time.perf_counter() + seconds
    for repeat in range(1, repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side(repeat)
            times[name].append(time.perf_counter() - start)
        if repeat >= 3 and time.perf_counter() > stop:
            break
    return times


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over repeats of two sides' ratio: neighbours in time share whatever else the machine was doing."""
    return statistics.median(x / y for x, y in zip(numerator, denominator, strict=True))


def decode_rows(setting: Setting, options: argparse.Namespace, bandwidth: ReadBandwidth) -> list[dict[str, object]]:
    """Measure one setting with every chosen kernel family."""
    pages = Pages(setting)
    sides: dict[str, Side] = {"read": lambda _: bandwidth.read(options.threads)}
    for name in options.kernels:
        kernels = kernels_for(CPU, name)
        sides[name] = pages.attend(kernels, mass=False)
        sides[f"{name} mass"] = pages.attend(kernels, mass=True)
    if options.torch:
        sides |= torch_sides(pages)
    times = take_turns(sides, options.repeats, options.seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    bests = {name: min(seconds) for name, seconds in times.items()}
    read = bandwidth.num_bytes / medians["read"]
    rows: list[dict[str, object]] = []
    for name in options.kernels:
        row: dict[str, object] = {
            "part": "decode",
            "kernels": name,
            "shape": setting.shape,
            "dtype": setting.dtype,
            "context": setting.context,
            "batch": setting.batch,
            "threads": options.threads,
            "repeats": len(times[name]),
            "bytes": setting.layer_bytes,
            "ms": medians[name] * 1e3,
            "spread": spread(times[name]),
            "gb_per_s": setting.layer_bytes / medians[name] / 1e9,
            "read_gb_per_s": read / 1e9,
            "of_bandwidth": setting.layer_bytes / bandwidth.num_bytes * ratio(times["read"], times[name]),
            # Best against best: what is left when neighbours on the machine take no time away.
            "of_bandwidth_best": setting.layer_bytes / bests[name] / (bandwidth.num_bytes / bests["read"]),
            "mass_extra_best": bests[f"{name} mass"] / bests[name] - 1,
            "mass_extra": ratio(times[f"{name} mass"], times[name]) - 1,
        }
        row |= {
            f"{side}_ratio": ratio(times[side], times[name]) for side in ("sdpa", "bmm", "gather+sdpa") if side in times
        }
        rows.append(row)
        print(_decode_line(row), flush=True)
    return rows


def _decode_line(row: dict[str, object]) -> str:
    ratios = "".join(f"  {row[side]:6.1f}x {side.removesuffix('_ratio')}" for side in row if side.endswith("_ratio"))
    return (
        f"{row['shape']:>4} {row['dtype']:>8} {row['context']:>6} x {row['batch']:<2} {row['kernels']:<11}"
        f" {row['bytes'] / 2**20:8.1f} MiB {row['ms']:8.2f} ms ±{row['spread']:4.0%} {row['gb_per_s']:6.1f} GB/s"
        f" = {row['of_bandwidth']:.2f} of {row['read_gb_per_s']:.1f} (best {row['of_bandwidth_best']:.2f})"
        f"  mass {row['mass_extra']:+.0%} (best {row['mass_extra_best']:+.0%}){ratios}"
    )


def prefill_rows(setting: Setting, options: argparse.Namespace) -> list[dict[str, object]]:
    """A causal prompt of `context` tokens, alone, against torch SDPA on contiguous float32."""
    dim, query_heads, heads = SHAPES[setting.shape]
    pages = Pages(Setting(setting.shape, setting.dtype, setting.context, 1))
    pages.queries = torch.randn(setting.context, query_heads, dim)
    pages.query_start = torch.tensor([0, setting.context], dtype=torch.int32)
    sides: dict[str, Side] = {}
    for name in options.kernels:
        kernels = kernels_for(CPU, name)
        sides[name] = pages.attend(kernels, mass=False)
        sides[f"{name} mass"] = pages.attend(kernels, mass=True)
    if options.torch:
        queries = pages.queries.transpose(0, 1)[None].contiguous()
        # Repeated heads, as transformers hands them over.
        keys, values = (x.repeat_interleave(query_heads // heads, dim=1) for x in pages.contiguous(0))
        sides["sdpa"] = lambda _: scaled_dot_product_attention(queries, keys, values, is_causal=True)
    times = take_turns(sides, options.repeats, options.seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    flop = 2 * query_heads * dim * setting.context**2  # both products, causal half
    rows: list[dict[str, object]] = []
    for name in options.kernels:
        row: dict[str, object] = {
            "part": "prefill",
            "kernels": name,
            "shape": setting.shape,
            "dtype": setting.dtype,
            "context": setting.context,
            "threads": options.threads,
            "repeats": len(times[name]),
            "ms": medians[name] * 1e3,
            "spread": spread(times[name]),
            "gflop_per_s": flop / medians[name] / 1e9,
            "mass_extra": ratio(times[f"{name} mass"], times[name]) - 1,
        }
        if "sdpa" in times:
            row["sdpa_ratio"] = ratio(times["sdpa"], times[name])
        rows.append(row)
        against = f"  {row['sdpa_ratio']:.2f}x sdpa" if "sdpa_ratio" in row else ""
        print(
            f"{row['shape']:>4} {row['dtype']:>8} {row['context']:>6} prompt {name:<11} {row['ms']:9.1f} ms"
            f" ±{row['spread']:4.0%} {row['gflop_per_s']:6.0f} GFLOP/s  mass {row['mass_extra']:+.0%}{against}",
            flush=True,
        )
    return rows


def failed_gates(rows: list[dict[str, object]]) -> list[str]:
    """What a gate demands and a row of the fastest family misses, in words."""
    failed = []
    best = available_kernels(CPU)[0]
    for row in rows:
        where = f"{row['kernels']} {row['shape']} {row['dtype']} {row['context']}"
        if row["kernels"] != best:
            continue
        if row["part"] == "prefill" and row.get("sdpa_ratio", math.inf) < PREFILL_GATE:
            failed.append(f"{where}: prefill {row['sdpa_ratio']:.2f}x SDPA, wanted {PREFILL_GATE}x")
        gated = (row["shape"], row["context"], row.get("batch")) == ("d128", 16384, 8) and row["dtype"] != "float32"
        if row["part"] != "decode" or not gated:
            continue
        if row["of_bandwidth"] < BANDWIDTH_GATE:
            failed.append(f"{where}: {row['of_bandwidth']:.2f} of read bandwidth, wanted {BANDWIDTH_GATE}")
        if row.get("sdpa_ratio", math.inf) < SDPA_GATE:
            failed.append(f"{where}: {row['sdpa_ratio']:.1f}x SDPA, wanted {SDPA_GATE}x")
        if row["mass_extra"] > MASS_GATE:
            failed.append(f"{where}: mass {row['mass_extra']:+.0%}, wanted at most {MASS_GATE:+.0%}")
    return failed


def tokens(text: str) -> int:
    """`16k` or `16384`."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = available_kernels(CPU)[:1]
    parser.add_argument("--part", choices=["decode", "prefill", "both"], default="both")
    parser.add_argument("--contexts", nargs="+", type=tokens, default=[tokens(c) for c in ("1k", "4k", "16k", "64k")])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--prompts", nargs="+", type=tokens, default=[8192], help="prompt lengths of the prefill part")
    parser.add_argument(
        "--kernels", nargs="+", choices=available_kernels(CPU), default=best, help="families to measure"
    )
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=8.0, help="stop repeating a setting after this time")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB that one setting may take")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out the sides of plain torch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print, write; 1 if a gate failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    bandwidth = ReadBandwidth()
    measured = {n: bandwidth.measure(n) / 1e9 for n in sorted({1, 2, options.threads})}
    print(f"read bandwidth, {bandwidth.how}: " + ", ".join(f"{n} thread(s) {b:.1f} GB/s" for n, b in measured.items()))
    rows: list[dict[str, object]] = []
    skipped = []
    grid = itertools.product(options.shapes, options.dtypes, options.contexts, options.batches)
    for setting in itertools.starmap(Setting, grid) if options.part != "prefill" else ():
        needed = setting.needed_bytes(options.torch) / 2**30
        if needed > options.memory:
            skipped.append(f"{setting.shape} {setting.dtype} {setting.context} x {setting.batch}")
            print(f"skipped {skipped[-1]}: needs {needed:.1f} GiB, --memory allows {options.memory:g}")
            continue
        rows += decode_rows(setting, options, bandwidth)
    for shape, dtype, prompt in itertools.product(options.shapes, options.dtypes, options.prompts):
        if options.part != "decode":
            rows += prefill_rows(Setting(shape, dtype, prompt, 1), options)
    failed = failed_gates(rows)
    write_results(options.output, rows, seed=SEED, read_gb_per_s=measured, skipped=skipped, failed_gates=failed)
    print(f"wrote {options.output}")
    print("gates: " + ("; ".join(failed) if failed else "none failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
