"""kill -9 at forty random moments: what is read back is what its key says, or it is a miss."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from kvwise.core.clock import MonotonicClock
from kvwise.tiers.base import Buffer, Extent, Fault
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.folder import MARKER
from kvwise.tiers.disk.segment import pages
from kvwise.tiers.disk.system import System
from kvwise.tiers.record import read_header, seal
from tests.tiers.disk_crash_worker import NUM_KEYS, Worker, is_right, open_store
from tests.tiers.samples import header_of, is_sound, key_of, record_of

NUM_KILLS = 40


def look(folder: Path, *, alone: bool) -> int:
    """Read everything; how many records are there. Exact counts only make sense when nobody else is at work."""
    with closing(open_store(str(folder))) as store:
        heads = [read_header(view) for view in store.scan()]
        assert not any(isinstance(head, Fault) for head in heads)
        slots = {head.key: pages(head.record_bytes) for head in heads}
        if alone:
            assert store.num_bytes() == sum(slots.values())
        num_whole = 0
        for number in range(NUM_KEYS):
            (view,) = store.read([Extent(key_of(number))])
            # One that was just being wiped or dug up may still have its header; its checksums say that it is none.
            sound = not isinstance(view, Fault) and is_sound(view, number)
            assert not sound or is_right(number, bytes(view))
            assert not alone or not sound or key_of(number) in slots
            num_whole += sound
        assert not alone or num_whole >= len(slots) - 8
    if alone:
        names = {path.name for path in folder.iterdir()} - {MARKER}
        assert all(name.startswith("segment-") for name in names)
        taken = sum((folder / name).stat().st_blocks * 512 for name in names)
        assert sum(slots.values()) <= taken <= sum(slots.values()) + 3 * 4096 * len(names)
    return num_whole


def test_killed_forty_times_no_wrong_byte_is_served_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder, rng = tmp_path / "tier", np.random.default_rng(0)
    most, seed = 0, 0
    with closing(Worker(folder)) as one, closing(Worker(folder)) as two:
        num_kills = 0
        while num_kills < NUM_KILLS:
            for worker in (one, two):
                if worker.process is None:
                    seed += 1
                    worker.start(seed, 100_000)
            time.sleep(float(rng.uniform(0.0, 0.06)))
            both = bool(rng.integers(2))
            for worker in (one, two) if both else (one,):
                os.kill(worker.process, signal.SIGKILL)
                assert worker.end() == -signal.SIGKILL
                num_kills += 1
            most = max(most, look(folder, alone=both))
        if two.process is not None:
            os.kill(two.process, signal.SIGKILL)
            two.end()
    assert most > 10  # there was something to lose


class Dies(System):
    """Stands still for good at one of its calls: as far as the medium can tell, the process was killed there."""

    class Killed(BaseException):
        """Not an error that anything could handle."""

    def __init__(self, calls_left: int) -> None:
        super().__init__()
        self.calls_left = calls_left

    def _next(self) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise self.Killed

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._next()
        if self.calls_left == 0:
            data = data[: len(data) // 2 // 4096 * 4096]  # half of it arrives
            if not data:
                raise self.Killed
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self._next()
        super().fdatasync(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        self._next()
        super().ftruncate(fd, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._next()
        super().punch(fd, offset, length)

    def unlink(self, name: str, folder: int) -> None:
        self._next()
        super().unlink(name, folder)


def replaced(number: int) -> list[Buffer]:
    """A later record of the same key."""
    return seal(header_of(number, stored_at=1.5e9), [[b"later" * 1000]])


def live(folder: Path, system: Dies) -> None:
    """Write, replace, wipe and delete, until the system stops."""
    with closing(DiskStore(folder, segment_bytes=1 << 15, system=system)) as store:
        for n in range(6):
            assert store.write([(key_of(n), [record_of(n, 2, 4000)])]) == [None]
        store.write([(key_of(n), replaced(n)) for n in (1, 2)])
        store.delete([key_of(3), key_of(4)], wipe=True)
        store.delete([key_of(0), key_of(1)])


def test_killed_at_every_single_call(tmp_path: Path) -> None:
    calls_left = 0
    finished = False
    while not finished:
        folder = tmp_path / str(calls_left)
        try:
            live(folder, Dies(calls_left))
            finished = True
        except Dies.Killed:
            pass
        with closing(DiskStore(folder)) as store:
            heads = [read_header(view) for view in store.scan()]
            slots = {head.key: pages(head.record_bytes) for head in heads}
            assert store.num_bytes() == sum(slots.values()), calls_left
            for n in range(6):
                (view,) = store.read([Extent(key_of(n))])
                if not isinstance(view, Fault) and is_sound(view, n):
                    assert bytes(view) in (record_of(n, 2, 4000), b"".join(replaced(n))), calls_left
        calls_left += 1
    assert calls_left > 20


class Counts(System):
    """Counts reads."""

    num_reads = 0

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.num_reads += 1
        return super().preadv(fd, buffers, offset)


def test_ten_thousand_records_are_found_again(tmp_path: Path) -> None:
    clock, system = MonotonicClock(), Counts()
    with closing(DiskStore(tmp_path / "tier")) as store:
        for start in range(0, 10_000, 500):
            batch = [(key_of(n), [record_of(n, 2, 60)]) for n in range(start, start + 500)]
            assert store.write(batch) == [None] * 500
    started = clock.now()
    with closing(DiskStore(tmp_path / "tier", system=system)) as store:
        found = {read_header(view).key for view in store.scan()}
        print(f"10,000 records found again in {clock.now() - started:.2f} s")
        assert found == {key_of(n) for n in range(10_000)}
        assert system.num_reads < 500  # many headers at once where records are small
        assert store.num_bytes() == 10_000 * 4096
