"""Processes that write, read, delete, scan and reopen a disk tier at random, until they are done or killed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from kvwise.tiers.base import Extent, Fault
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.record import read_header
from tests.tiers.samples import is_sound, key_of, pieces_of, record_of

NUM_KEYS = 60
SEGMENT_BYTES = 256 << 10
SIZES = (300, 3000, 9000, 40_000)


class Worker:
    """Starts such a process again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, "-m", "tests.tiers.disk_crash_worker"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        self._server = subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.process: int | None = None  # the one at work

    def start(self, seed: int, num_steps: int) -> None:
        """Begin; it is at work when this returns."""
        print(self._folder, seed, num_steps, file=self._server.stdin, flush=True)
        self.process = int(self._server.stdout.readline())

    def end(self) -> int:
        """Wait for its end: 0 if it read nothing wrong, minus the signal if it was killed."""
        self.process = None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=60)


def open_store(folder: str) -> DiskStore:
    """The tier, in segments small enough to be finished, adopted and removed all the time."""
    return DiskStore(folder, segment_bytes=SEGMENT_BYTES)


def size_of(number: int) -> int:
    """Bytes of each of its two segments: what a key holds follows from the key."""
    return SIZES[number % len(SIZES)]


def is_right(number: int, record: bytes) -> bool:
    """Whether the record is exactly what its key says."""
    return is_sound(record, number) and record == record_of(number, 2, size_of(number))


def step(store: DiskStore, rng: np.random.Generator) -> bool:
    """One random operation; whether all that was read was right."""
    numbers = [int(n) for n in rng.integers(0, NUM_KEYS, int(rng.integers(1, 9)))]
    action = rng.integers(8)
    if action < 4:
        store.write([(key_of(n), pieces_of(n, 2, size_of(n))) for n in numbers])
    elif action < 6:
        store.delete([key_of(n) for n in numbers], wipe=action == 5)
    elif action == 6:
        return all(not isinstance(read_header(head), Fault) for head in store.scan())
    got = [
        view if isinstance(view, Fault) else bytes(view) for view in store.read([Extent(key_of(n)) for n in numbers])
    ]
    # What another process deletes while it is read may come back torn; then its checksums say so.
    return all(
        isinstance(record, Fault) or is_right(n, record) or not is_sound(record, n)
        for n, record in zip(numbers, got, strict=True)
    )


def work(folder: str, seed: int, num_steps: int) -> int:
    """Run; 1 if anything that was read was wrong."""
    rng = np.random.default_rng(seed)
    store = open_store(folder)
    for number in range(num_steps):
        if not step(store, rng):
            print(f"seed {seed}, step {number}: wrong bytes", file=sys.stderr, flush=True)
            return 1
        if rng.integers(20) == 0:
            store.close()
            store = open_store(folder)
    store.close()
    return 0


def serve() -> None:
    """For each line "FOLDER SEED STEPS" fork a child that works, say its process id, and how it ended.

    Loading torch takes longer than a child lives: here it is loaded once. This process has no threads.
    """
    for line in sys.stdin:
        folder, seed, num_steps = line.split()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = work(folder, int(seed), int(num_steps))
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
