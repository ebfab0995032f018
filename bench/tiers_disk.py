"""The disk tier against the disk: which layout of a folder, and how near to plain O_DIRECT reads the store comes.

`python bench/tiers_disk.py --layout [FOLDER]` compares one file per record with append-only segment files.
"""

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

PAGE = 4096
DIRECT = getattr(os, "O_DIRECT", 0)
SIZES = {"32 KiB": 32 << 10, "200 KiB": 200 << 10, "2 MiB": 2 << 20}
BATCH_BYTES = 8 << 20
READ_BYTES = 4 << 20


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
        os.pwrite(self.fd, self.buffer[: count * self.slot], first * self.slot)
        os.fdatasync(self.fd)

    def read(self, indices: Sequence[int]) -> None:
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
        for index in range(count):
            os.preadv(self.fd, [self.buffer[:PAGE]], index * self.slot)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare_layouts(folder: Path, total: int = 128 << 20, rounds: int = 3) -> None:
    """GB/s of durable writes and cold reads in batches of 8 MiB, records in order and scattered; ms of a start."""
    print(f"{'records of':12}{'layout':10}{'write':>8}{'in order':>10}{'scattered':>11}   GB/s{'start':>10} us a record")
    for label, size in SIZES.items():
        count = total // size
        step = max(1, BATCH_BYTES // (-(-size // PAGE) * PAGE))
        scattered = [(i * 7919) % count for i in range(count)]
        for layout in (Files, Segments):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                side = layout(Path(place), size)
                batches = [range(i, min(i + step, count)) for i in range(0, count, step)]
                write = median(seconds(lambda b=b: side.write(b[0], len(b))) / len(b) for b in batches)
                order, random, start = [], [], []
                for _ in range(rounds):
                    order += [seconds(lambda b=b: side.read(b)) / len(b) for b in batches]
                    random += [seconds(lambda b=b: side.read([scattered[i] for i in b])) / len(b) for b in batches]
                    start.append(seconds(lambda: side.start(count)) / count)
                rates = [size / t / 1e9 for t in (write, median(order), median(random))]
                print(f"{label:12}{layout.__name__:10}{rates[0]:8.2f}{rates[1]:10.2f}{rates[2]:11.2f}"
                      f"{median(start) * 1e6:17.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    compare_layouts(Path(arguments[0] if arguments else tempfile.gettempdir()))
