"""Reading many records at once: neighbours in one read, a few reads in flight."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from kvwise.tiers.base import Fault, FaultKind
from kvwise.tiers.disk.folder import Handles
from kvwise.tiers.disk.segment import PAGE, Place, Segment, pages
from kvwise.tiers.disk.system import System, fault_of
from kvwise.tiers.scratch import Scratch

READ_BYTES = 4 << 20  # one read: larger ones gained nothing, and could not be in flight side by side
_GAP_BYTES = 32 << 10  # reading on over so many foreign bytes costs less than another read


class Wanted(NamedTuple):
    """Bytes [start, stop) of the record at `place`."""

    place: Place
    start: int
    stop: int


@dataclass(slots=True)
class _Read:
    """One read: pages [start, stop) of a segment, and how it went."""

    segment: Segment
    start: int
    stop: int
    base: int = 0  # where its bytes begin in the buffer
    num_bytes: int = 0  # that arrived
    fault: Fault | None = None
    items: list[int] = field(default_factory=list)  # numbers of what is wanted and touches this read


class Reader:
    """Reads into a buffer of the calling thread."""

    def __init__(self, system: System, handles: Handles, in_flight: int) -> None:
        self._system, self._handles, self._in_flight = system, handles, in_flight
        self._scratch = Scratch()
        self._pool = ThreadPoolExecutor(max(1, in_flight - 1), thread_name_prefix="kvwise-disk-read")

    def read(self, wanted: Sequence[Wanted]) -> list[memoryview | Fault]:
        """The bytes of each, unverified. A read that fails is tried again item by item, each by itself."""
        runs = _runs(wanted)
        buffer = self._lay_out(runs)
        self._perform(runs, buffer)
        answers: list[memoryview | Fault] = [memoryview(b"")] * len(wanted)
        for run in runs:
            for number in run.items:
                answers[number] = self._cut(wanted[number], run, buffer)
        return answers

    def _lay_out(self, runs: Sequence[_Read]) -> memoryview:
        total = 0
        for run in runs:
            run.base = total
            total += run.stop - run.start
        self._scratch.begin()
        return self._scratch.place(total)  # begins at a page: it is the first of its slab

    def _perform(self, runs: Sequence[_Read], buffer: memoryview) -> None:
        """All reads, several at once; long runs are cut so that they, too, are read side by side."""
        parts = [
            (run, _Read(run.segment, start, min(start + READ_BYTES, run.stop), run.base + start - run.start))
            for run in runs
            for start in range(run.start, run.stop, READ_BYTES)
        ]
        queue = deque(part for _, part in parts)

        def work() -> None:
            while queue:
                try:
                    part = queue.popleft()
                except IndexError:
                    return
                self._read(part, buffer)

        helpers = [self._pool.submit(work) for _ in range(min(self._in_flight, len(parts)) - 1)]
        work()
        for helper in helpers:
            helper.result()
        for run, part in parts:
            run.num_bytes += part.num_bytes if run.num_bytes == part.start - run.start else 0
            run.fault = run.fault or part.fault

    def _read(self, part: _Read, buffer: memoryview) -> None:
        try:
            with self._handles.use(part.segment.name) as fd:
                size = part.stop - part.start
                while part.num_bytes < size:
                    rest = buffer[part.base + part.num_bytes : part.base + size]
                    got = self._system.preadv(fd, [rest], part.start + part.num_bytes)
                    part.num_bytes += got
                    if got == 0 or part.num_bytes % PAGE:  # the end of the file
                        break
        except FileNotFoundError:
            part.fault = Fault(FaultKind.MISSING, "its file is gone")
        except OSError as error:
            part.fault = fault_of(error)

    def _cut(self, item: Wanted, run: _Read, buffer: memoryview) -> memoryview | Fault:
        first = item.place.offset + item.start - run.start
        last = first + item.stop - item.start
        if run.fault and last > run.num_bytes and run.fault.kind != FaultKind.MISSING:
            start, stop = _pages(item)
            again = _Read(run.segment, start, stop, run.base + start - run.start)
            if len(run.items) > 1:  # a bad spot must not take its neighbours along
                self._read(again, buffer)
            else:
                again.fault = run.fault
            if again.fault:
                return again.fault
            run_end = start - run.start + again.num_bytes
        else:
            run_end = run.num_bytes
        if last > run_end:
            return run.fault or Fault(FaultKind.CORRUPT, f"the file ends {last - run_end} bytes too early")
        return buffer[run.base + first : run.base + last].toreadonly()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)


def _pages(item: Wanted) -> tuple[int, int]:
    """The pages of the file that hold what is wanted."""
    return (item.place.offset + item.start) // PAGE * PAGE, pages(item.place.offset + item.stop)


def _runs(wanted: Sequence[Wanted]) -> list[_Read]:
    """What is wanted as runs of pages, neighbours together."""
    order = sorted(
        (number for number, item in enumerate(wanted) if item.stop > item.start),
        key=lambda number: (wanted[number].place.segment.name, wanted[number].place.offset + wanted[number].start),
    )
    runs: list[_Read] = []
    for number in order:
        item = wanted[number]
        start, stop = _pages(item)
        last = runs[-1] if runs else None
        if last is None or last.segment is not item.place.segment or start > last.stop + _GAP_BYTES:
            last = _Read(item.place.segment, start, stop)
            runs.append(last)
        last.stop = max(last.stop, stop)
        last.items.append(number)
    return runs
