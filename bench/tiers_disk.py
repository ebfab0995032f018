"""Disk tier against plain O_DIRECT reads of 4 MiB of the same bytes in the same run; and the choice of its layout.

`python bench/tiers_disk.py [FOLDER]` reads records of 200 KiB and 2 MiB in batches of 4, 8 and 16 MiB. Sides are
interleaved batch by batch and go past the page cache; each figure is the median over batches and repeats. The plain
side reads into ordinary memory with one read in flight, as `dd` does; "huge" is the same into huge pages, the best
that one thread gets from this disk. "placed" is the gate: the store's read, then every record verified and copied to
where the engine wants it, on one thread; "python" does so with `open_record`, which copies nothing. It also prints how
long 10,000 records take to be found again.

`--layout` compares one file per record with append-only segment files, both written for this comparison alone.
"""

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kvwise.tiers.base import Extent, Fault
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.buffers import aligned as huge
from kvwise.tiers.fused import Shape, Wanted, copier
from kvwise.tiers.memory import allocate
from kvwise.tiers.record import Header, open_record, pack_header, seal
from machine import write_results

RESULTS = Path(__file__).parent / "results"
GATE = 0.85  # of plain reads
PAGE = 4096
DIRECT = getattr(os, "O_DIRECT", 0)
SIZES = {"32 KiB": 32 << 10, "200 KiB": 200 << 10, "2 MiB": 2 << 20}
BATCH_BYTES = 8 << 20
READ_BYTES = 4 << 20
NUM_LAYERS = 16
IDENTITY = bytes(32)


def aligned(num_bytes: int) -> memoryview:
    """Memory that O_DIRECT takes, touched once so that no page fault is timed."""
    view = memoryview(mmap.mmap(-1, num_bytes))
    view[:] = os.urandom(1 << 16) * (num_bytes >> 16) + bytes(num_bytes & 0xFFFF)
    return view


class Files:
    """One file per record: written under another name, synced, renamed; the folder synced once a batch."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.slot = -(-size // PAGE) * PAGE
        self.pool = ThreadPoolExecutor(2)
        self.buffer = aligned(max(BATCH_BYTES, self.slot))

    def write(self, first: int, count: int) -> None:
        """One batch, durable when this returns."""
        for index in range(first, first + count):
            fd = os.open(self.folder / f"{index}.part", os.O_WRONLY | os.O_CREAT | DIRECT, 0o600)
            os.pwrite(fd, self.buffer[: self.slot], 0)
            os.fdatasync(fd)
            os.close(fd)
            os.rename(self.folder / f"{index}.part", self.folder / f"{index}")
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def read(self, indices: Sequence[int]) -> None:
        """These records, two at once."""
        list(self.pool.map(self._read_one, indices, range(len(indices))))

    def _read_one(self, index: int, place: int) -> None:
        fd = os.open(self.folder / str(index), os.O_RDONLY | DIRECT)
        os.preadv(fd, [self.buffer[place * self.slot :][: self.slot]], 0)
        os.close(fd)

    def start(self, count: int) -> None:
        """The first page of every record, as a rebuilt index needs it."""
        for entry in os.scandir(self.folder):
            fd = os.open(entry.path, os.O_RDONLY | DIRECT)
            os.preadv(fd, [self.buffer[:PAGE]], 0)
            os.close(fd)


class Segments(Files):
    """Append-only files: one write and one sync a batch; neighbours are read in one go, two reads in flight."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder, size)
        self.fd = os.open(folder / "segment", os.O_RDWR | os.O_CREAT | DIRECT, 0o600)

    def write(self, first: int, count: int) -> None:
        """See `Files.write`."""
        os.pwrite(self.fd, self.buffer[: count * self.slot], first * self.slot)
        os.fdatasync(self.fd)

    def read(self, indices: Sequence[int]) -> None:
        """See `Files.read`."""
        runs: list[tuple[int, int]] = []
        for index in sorted(indices):
            start, stop = index * self.slot, (index + 1) * self.slot
            if runs and runs[-1][1] == start and stop - runs[-1][0] <= READ_BYTES:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        places = [0]
        for start, stop in runs:
            places.append(places[-1] + stop - start)
        list(self.pool.map(self._read_run, runs, places))

    def _read_run(self, run: tuple[int, int], place: int) -> None:
        os.preadv(self.fd, [self.buffer[place : place + run[1] - run[0]]], run[0])

    def start(self, count: int) -> None:
        """See `Files.start`."""
        for index in range(count):
            os.preadv(self.fd, [self.buffer[:PAGE]], index * self.slot)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Plain:
    """Reads of 4 MiB from segment files of a closed store, one after another."""

    def __init__(self, folder: Path, memory: memoryview) -> None:
        self._files = [(os.open(p, os.O_RDONLY | DIRECT), p.stat().st_size) for p in sorted(folder.glob("segment-*"))]
        self._memory = memory

    def read(self, start: int, num_bytes: int) -> None:
        """So many bytes from `start` on, counted over all files."""
        for fd, size in self._files:
            while num_bytes > 0 and start < size:
                got = os.preadv(fd, [self._memory[: min(READ_BYTES, num_bytes, size - start)]], start)
                start, num_bytes = start + got, num_bytes - got
            start = max(0, start - size)

    def close(self) -> None:
        """Close the files."""
        for fd, _ in self._files:
            os.close(fd)


def layer_bytes(num_bytes: int) -> int:
    """Bytes of a segment of a record of about so many bytes."""
    return num_bytes // NUM_LAYERS // 64 * 64 - 64


def record(number: int, num_bytes: int) -> tuple[bytes, list[memoryview | bytes]]:
    """Key and pieces of a record of about so many bytes, one segment a layer."""
    rng = np.random.default_rng(number)
    layer = layer_bytes(num_bytes)
    header = Header(rng.bytes(32), IDENTITY, IDENTITY, "raw", 16, number, 0.0)
    return header.key, seal(header, [(memoryview(rng.bytes(layer)),) for _ in range(NUM_LAYERS)])  # type: ignore[return-value]


class Reader:
    """Reads batches through the store and verifies every byte; RuntimeError if anything is wrong."""

    def __init__(self, store: DiskStore, num_bytes: int, most: int) -> None:
        half = layer_bytes(num_bytes) // 2
        self._shape = Shape(NUM_LAYERS, half, half, 2 * half, 2 * half)
        self._arena = allocate((most * NUM_LAYERS * 2 * half,), torch.uint8, torch.device("cpu"))
        self._store, self._copier = store, copier()

    def read(self, keys: Sequence[bytes]) -> list[memoryview]:
        """Read only."""
        views = self._store.read([Extent(key) for key in keys])
        if any(isinstance(view, Fault) for view in views):
            raise RuntimeError(f"the store answered {views}")
        return views  # type: ignore[return-value]

    def check(self, keys: Sequence[bytes]) -> None:
        """Read, and open record by record."""
        for key, view in zip(keys, self.read(keys), strict=True):
            if isinstance(open_record(view, key, IDENTITY, "raw"), Fault):
                raise RuntimeError("a record is not sound")

    def place(self, keys: Sequence[bytes]) -> None:
        """Read, verify and copy, as loading does."""
        views = self.read(keys)
        starts = [self._arena.data_ptr() + i * NUM_LAYERS * self._shape.key_stride for i in range(len(keys))]
        values = [start + self._shape.key_bytes for start in starts]
        if not all(self._copier.open(self._shape, Wanted(list(keys), IDENTITY, "raw"), views, starts, values)):
            raise RuntimeError("a record is not sound")


def measure(folder: Path, num_bytes: int, batch_bytes: int, *, total: int, repeats: int) -> dict[str, object]:
    """One row: GB/s of all sides for records of so many bytes, read in batches of about `batch_bytes`."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "tier"
        step, count = max(1, batch_bytes // num_bytes), total // num_bytes
        with closing(DiskStore(path)) as store:
            keys, seconds_written = [], []
            for start in range(0, count // step * step, step):
                batch = [record(number, num_bytes) for number in range(start, start + step)]
                seconds_written.append(seconds(lambda b=batch: store.write(b)))
                keys += [key for key, _ in batch]
        slot = -(-len(b"".join(record(0, num_bytes)[1])) // PAGE) * PAGE
        batches = [keys[start : start + step] for start in range(0, len(keys), step)]
        with closing(DiskStore(path)) as store:
            reader = Reader(store, num_bytes, step)
            plain, best = Plain(path, aligned(READ_BYTES)), Plain(path, huge(READ_BYTES))
            sides: dict[str, Callable[[int], object]] = {
                "plain": lambda i: plain.read(i * step * slot, step * slot),
                "huge": lambda i: best.read(i * step * slot, step * slot),
                "read": lambda i: reader.read(batches[i]),
                "python": lambda i: reader.check(batches[i]),
                "placed": lambda i: reader.place(batches[i]),
            }
            took: dict[str, list[float]] = {side: [] for side in sides}
            for repeat in range(repeats + 1):
                for i in range(len(batches)):
                    for side, go in sides.items():
                        second = seconds(lambda go=go, i=i: go(i))
                        if repeat:  # the first is a warm-up
                            took[side].append(second)
            plain.close()
            best.close()
    speed = {side: step * slot / median(each) / 1e9 for side, each in took.items()}
    row = {"record_bytes": num_bytes, "batch_bytes": step * num_bytes, **speed}
    return row | {"write": step * slot / median(seconds_written) / 1e9, "ratio": speed["placed"] / speed["plain"]}


def found_again(folder: Path, num_bytes: int, count: int = 10_000) -> float:
    """Seconds to open a tier of so many records and read all headers. Bodies are holes: only headers are looked at."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "tier"
        with closing(DiskStore(path)):
            pass
        slot = -(-len(b"".join(record(0, num_bytes)[1])) // PAGE) * PAGE
        per_file = max(1, (128 << 20) // slot)
        for start in range(0, count, per_file):
            with open(path / f"segment-{start:016x}-00000001.kv", "wb") as file:
                for number in range(start, min(start + per_file, count)):
                    file.seek((number - start) * slot)
                    file.write(head_of(number, num_bytes))
                file.truncate(min(per_file, count - start) * slot)
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        with closing(DiskStore(path)) as store:
            num_found = sum(1 for _ in store.scan())
            took = time.perf_counter() - begin
        if num_found != count:
            raise RuntimeError(f"{num_found} of {count} records were found")
        return took


def head_of(number: int, num_bytes: int) -> bytes:
    """The header of record `number`, without its body."""
    layer = layer_bytes(num_bytes)
    key = np.random.default_rng(number).bytes(32)
    return pack_header(Header(key, IDENTITY, IDENTITY, "raw", 16, number, 0.0), [(layer, bytes(16))] * NUM_LAYERS)


def compare_layouts(folder: Path, total: int = 128 << 20, rounds: int = 3) -> None:
    """GB/s of durable writes and cold reads in batches of 8 MiB, records in order and scattered; ms of a start."""
    print(
        f"{'records of':12}{'layout':10}{'write':>8}{'in order':>10}{'scattered':>11}   GB/s{'start':>10} us a record"
    )
    for label, size in SIZES.items():
        count = total // size
        step = max(1, BATCH_BYTES // (-(-size // PAGE) * PAGE))
        scattered = [(i * 7919) % count for i in range(count)]
        for layout in (Files, Segments):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                side = layout(Path(place), size)
                batches = [range(i, min(i + step, count)) for i in range(0, count, step)]
                write = median(seconds(partial(side.write, b[0], len(b))) / len(b) for b in batches)
                order, random, start = [], [], []
                for _ in range(rounds):
                    order += [seconds(partial(side.read, b)) / len(b) for b in batches]
                    random += [seconds(partial(side.read, [scattered[i] for i in b])) / len(b) for b in batches]
                    start.append(seconds(partial(side.start, count)) / count)
                rates = [size / t / 1e9 for t in (write, median(order), median(random))]
                print(f"{label:12}{layout.__name__:10}{rates[0]:8.2f}{rates[1]:10.2f}{rates[2]:11.2f}"
                      f"{median(start) * 1e6:17.0f}", flush=True)  # fmt: skip


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as text."""
    names = ("plain", "huge", "read", "python", "placed", "write")
    lines = [f"{'record':>9} {'batch':>7} " + " ".join(f"{name:>8}" for name in names) + "  GB/s; placed/plain"]
    for row in rows:
        figures = " ".join(f"{row[name]:8.2f}" for name in names)
        sizes = [int(str(row[name])) / 1024 for name in ("record_bytes", "batch_bytes")]
        lines.append(f"{sizes[0]:5.0f} KiB {sizes[1] / 1024:3.0f} MiB {figures} {row['ratio']:10.2f}")
    return "\n".join(lines)


def run(folder: Path, *, total: int = 64 << 20, repeats: int = 3) -> list[dict[str, object]]:
    """Rows of all sizes of records and batches."""
    return [
        measure(folder, num_bytes, batch, total=total, repeats=repeats)
        for num_bytes in (200 << 10, 2 << 20)
        for batch in (4 << 20, 8 << 20, 16 << 20)
    ]


def main() -> None:
    """Print the table; exit 1 below the gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layout", action="store_true", help="compare layouts instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/tiers_disk.json")
    arguments = parser.parse_args()
    if arguments.layout:
        compare_layouts(arguments.folder)
        return
    rows = run(arguments.folder, repeats=arguments.repeats)
    print(table(rows))
    starts = {f"start_{label}": found_again(arguments.folder, size) for label, size in SIZES.items()}
    print(
        "10,000 records are found again in",
        ", ".join(f"{took:.2f} s" for took in starts.values()),
        f"({', '.join(SIZES)})",
    )
    if arguments.save:
        write_results(RESULTS / "tiers_disk.json", rows, seed=0, gate=GATE, **starts)
    slow = [row for row in rows if float(str(row["ratio"])) < GATE]
    if slow:
        raise SystemExit(f"below {GATE} of plain reads: {len(slow)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
