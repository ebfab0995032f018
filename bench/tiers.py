"""Tiers against what their medium does at most: host memory against memcpy, disk and Redis against plain reads.

    python bench/tiers.py                      # all parts that can run here, and the gates
    python bench/tiers.py host --repeats 50
    python bench/tiers.py host --threads 2

Host: raw blocks of 0.2 to 4 MiB, in batches of 16 scattered over an arena, go down into a `HostStore` (copied,
digested, sealed, booked; each replaces an older record) and come back (looked up, verified, copied into the arena). The
plain side is one memcpy each for a block's keys and values, by native code, in the same order over as many bytes. Sides
take turns batch by batch and never touch bytes that a cache may still hold; "one by one" is the same block by block,
"two passes" copies with memmove and checks with xxhash. Headers are made outside of the time.

Gates: host at least 0.9 of memcpy in both directions; those of the other parts stand in their files. Ratios are medians
over the repeats with half the distance between quartiles. Rows also go to bench/results/tiers.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

import tiers_disk
import tiers_redis
from kvwise.core.layout import KVLayout
from kvwise.kernels import kernels_for
from kvwise.tiers.arena import Arena
from kvwise.tiers.base import Extent
from kvwise.tiers.blocks import restore_block, restore_blocks, seal_block, seal_blocks
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.fused import Shape, Wanted, copier
from kvwise.tiers.host import HostStore
from kvwise.tiers.record import Header
from machine import CPU, write_results

PARTS = ("host", "disk", "redis")
SEED = 0
GATE = 0.9
BATCH = 16  # blocks
ARENA_BYTES = 192 << 20  # each of the three places that bytes move between
IDENTITY = sha256(b"bench").digest()
RAW = Raw()
LAYOUTS = {  # block sizes as models of 0.1 to 8 thousand million parameters have them
    "192 KiB": KVLayout(12, 4, 64, element_bytes=2),
    "512 KiB": KVLayout(16, 8, 64, element_bytes=2),
    "2 MiB": KVLayout(32, 8, 128, element_bytes=2),
    "4 MiB": KVLayout(32, 8, 128, element_bytes=4),
}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Host:
    """A full arena, as many bytes of plain memory, and a store that holds a record of every block."""

    def __init__(self, layout: KVLayout, num_threads: int) -> None:
        self.num_threads = num_threads
        self.num_blocks = max(2 * BATCH, ARENA_BYTES // layout.block_bytes)
        arena, plain = (Arena(layout, self.num_blocks, DTYPES[layout.element_bytes], CPU) for _ in range(2))
        generator = torch.Generator().manual_seed(SEED)
        for tensor in (arena.keys, arena.values, plain.keys, plain.values):
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
        shape = (self.num_blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.keys, self.values = arena.keys.view(shape), arena.values.view(shape)
        # A block's keys (or values) are one page to the plain side: one memcpy.
        self._pairs = [
            (x.view(self.num_blocks, 1, -1), y.view(self.num_blocks, 1, -1)) for x, y in _tensors(arena, plain)
        ]
        self._kernels = kernels_for(CPU, num_threads=num_threads)
        self.names = [sha256(b"%d" % n).digest() for n in range(self.num_blocks)]
        self.headers = [Header(name, name, IDENTITY, "raw", 16, n, 1.0) for n, name in enumerate(self.names)]
        self.shape = Shape(layout.num_layers, *[layout.block_bytes // layout.num_layers // 2] * 4)
        self.store = HostStore((self.num_blocks + BATCH) * self.shape.record_bytes, num_threads=num_threads)
        self.place = memoryview(bytearray(BATCH * self.shape.record_bytes))
        self.store_batch(list(range(self.num_blocks)))

    def copy_down(self, blocks: list[int]) -> None:
        """The plain side of storing."""
        for arena, plain in self._pairs:
            self._kernels.copy_pages(arena, torch.tensor(blocks), plain, torch.tensor(blocks))

    def copy_up(self, blocks: list[int]) -> None:
        """The plain side of loading."""
        for arena, plain in self._pairs:
            self._kernels.copy_pages(plain, torch.tensor(blocks), arena, torch.tensor(blocks))

    def store_batch(self, blocks: list[int]) -> None:
        """Blocks into the store, replacing their older records."""
        headers = [self.headers[block] for block in blocks]
        records = seal_blocks(RAW, 0, headers, self.keys, self.values, blocks)
        _none(self.store.write([(self.names[block], record) for block, record in zip(blocks, records, strict=True)]))

    def store_singly(self, blocks: list[int]) -> None:
        """The same, one by one."""
        for block in blocks:
            record = seal_block(RAW, 0, self.headers[block], self.keys[block], self.values[block])
            _none(self.store.write([(self.names[block], record)]))

    def load_batch(self, blocks: list[int]) -> None:
        """Records from the store into the arena."""
        names = [self.names[block] for block in blocks]
        views = self.store.read([Extent(name) for name in names])
        _none(restore_blocks(views, names, IDENTITY, RAW, 0, self.keys, self.values, blocks, self.num_threads))

    def load_singly(self, blocks: list[int]) -> None:
        """The same, one by one."""
        for block in blocks:
            (view,) = self.store.read([Extent(self.names[block])])
            found = restore_block(view, self.names[block], IDENTITY, RAW, 0, self.keys[block], self.values[block])
            _none([None if isinstance(found, Header) else found])

    def store_in_two_passes(self, blocks: list[int]) -> None:
        """The plain copier, with the store's own book left out."""
        size = self.shape.record_bytes
        places = [self.place[i * size : (i + 1) * size] for i in range(len(blocks))]
        headers = [self.headers[block] for block in blocks]
        copier("plain").seal(self.shape, headers, *self._addresses(blocks), places)

    def load_in_two_passes(self, blocks: list[int]) -> None:
        """The plain copier over what the store reads."""
        names = [self.names[block] for block in blocks]
        views = self.store.read([Extent(name) for name in names])
        sound = copier("plain").open(self.shape, Wanted(names, IDENTITY, "raw"), views, *self._addresses(blocks))
        _none([None if good else good for good in sound])

    def _addresses(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        tensors = (self.keys, self.values)
        keys, values = ([t.data_ptr() + b * t.stride(0) * t.itemsize for b in blocks] for t in tensors)
        return keys, values


def _tensors(arena: Arena, plain: Arena) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(arena.keys, plain.keys), (arena.values, plain.values)]


def _none(faults: list[object]) -> None:
    if any(fault is not None for fault in faults):
        raise RuntimeError(f"a tier of this benchmark does not work: {faults}")


def take_turns(sides: dict[str, Callable[[list[int]], None]], num_blocks: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each side and repeat, each over one batch; no side meets a block that was moved in the last turns."""
    order = np.random.default_rng(SEED).permutation(num_blocks).tolist()
    batches = [order[i : i + BATCH] for i in range(0, num_blocks - BATCH + 1, BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, repeats):
        for index, (name, side) in enumerate(sides.items()):
            blocks = batches[((turn + 1) * len(sides) + index) % len(batches)]
            start = time.perf_counter()
            side(blocks)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def host_rows(options: argparse.Namespace) -> list[dict[str, object]]:
    """Both directions of every layout."""
    rows = []
    for label in options.blocks:
        host = Host(LAYOUTS[label], options.threads)
        down = {"memcpy": host.copy_down, "kvwise": host.store_batch, "one by one": host.store_singly}
        up = {"memcpy": host.copy_up, "kvwise": host.load_batch, "one by one": host.load_singly}
        directions = {
            "store": {**down, "two passes": host.store_in_two_passes},
            "load": {**up, "two passes": host.load_in_two_passes},
        }
        for direction, sides in directions.items():
            seconds = take_turns(sides, host.num_blocks, options.repeats)
            rows.append(_row(direction, label, options.threads, BATCH * LAYOUTS[label].block_bytes, seconds))
            print(line(rows[-1]))
        host.store.close()
    return rows


def _row(
    direction: str, label: str, threads: int, num_bytes: int, seconds: dict[str, list[float]]
) -> dict[str, object]:
    row: dict[str, object] = {"part": "host", "what": direction, "block": label, "threads": threads}
    for name, times in seconds.items():
        row[f"{name}_gb_per_s"] = num_bytes / statistics.median(times) / 1e9
        ratios = [plain / took for plain, took in zip(seconds["memcpy"], times, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        row[f"{name}_ratio"] = quartiles[1]
        row[f"{name}_spread"] = (quartiles[2] - quartiles[0]) / 2
    return row


def line(row: dict[str, object]) -> str:
    """One row of the host part as text."""
    sides = " | ".join(
        f"{name} {row[f'{name}_gb_per_s']:5.1f} GB/s = {row[f'{name}_ratio']:4.2f} ± {row[f'{name}_spread']:4.2f}"
        for name in ("kvwise", "one by one", "two passes")
    )
    return f"{row['what']:5} {row['block']:>8} | memcpy {row['memcpy_gb_per_s']:5.1f} GB/s | {sides}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="{host,disk,redis}", help="all three unless given")
    parser.add_argument("--blocks", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of the host part")
    parser.add_argument("--threads", type=int, default=1, help="of the host part, for both sides")
    parser.add_argument("--repeats", type=int, default=100, help="of the host part")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of the disk part")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tiers.json")
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(PARTS)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {min(unknown)!r}; parts: {', '.join(PARTS)}")
    return options


def main() -> int:
    """Measure, print, write; 1 if a gate failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    failed = []
    if "host" in options.parts:
        rows += host_rows(options)
        slow = [row for row in rows if float(str(row["kvwise_ratio"])) < GATE]
        failed += [f"host {row['what']} {row['block']}: {row['kvwise_ratio']:.2f} of memcpy" for row in slow]
    for part, module, measure in (
        ("disk", tiers_disk, lambda: tiers_disk.run(options.folder)),
        ("redis", tiers_redis, lambda: tiers_redis.run(9)),
    ):
        if part in options.parts:
            found = measure()
            print(module.table(found))
            failed += [f"{part}: {row}" for row in found if float(str(row["ratio"])) < module.GATE]
            rows += [{"part": part, **row} for row in found]
    write_results(options.output, rows, seed=SEED, failed_gates=failed)
    print(f"wrote {options.output}")
    print("gates: " + ("; ".join(failed) if failed else "none failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
