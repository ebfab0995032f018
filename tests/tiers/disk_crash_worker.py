"""A process that writes, reads, deletes and reopens a disk tier at random, until it is done or killed.

`python -m tests.tiers.disk_crash_worker FOLDER SEED STEPS`; it ends with 1 if it ever reads wrong bytes.
"""

import sys

import numpy as np

from kvwise.tiers.base import Extent, Fault
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.record import read_header
from tests.tiers.samples import is_sound, key_of, pieces_of, record_of

NUM_KEYS = 60
SEGMENT_BYTES = 256 << 10
SIZES = (300, 3000, 9000, 40_000)


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


def main() -> int:
    """Run."""
    folder, seed, num_steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = np.random.default_rng(seed)
    store = open_store(folder)
    print("ready", flush=True)
    for number in range(num_steps):
        if not step(store, rng):
            print(f"step {number}: wrong bytes")
            return 1
        if rng.integers(20) == 0:
            store.close()
            store = open_store(folder)
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
