"""Handing dead bytes back to the file system, in the background and many at once.

Measured on a virtual disk with discard: a hole takes about 1 ms and another 1 ms for each MiB, a tombstone 0.01 ms.
A deletion therefore writes the tombstone and leaves the hole to this thread, which digs neighbours as one.
"""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from kvwise.tiers.disk.buffers import aligned
from kvwise.tiers.disk.folder import Folder, Handles
from kvwise.tiers.disk.index import Index
from kvwise.tiers.disk.segment import PAGE, Place, Segment, tombstone
from kvwise.tiers.disk.system import NO_HOLES, System, write_all

_MOST_DEBT = 256 << 20
_ZEROS = 1 << 20


class Janitor:
    """Digs holes where records died, and removes files in which nothing lives."""

    def __init__(self, system: System, folder: Folder, handles: Handles, index: Index) -> None:
        self._system, self._folder, self._handles, self._index = system, folder, handles, index
        self._debt: dict[Segment, list[tuple[int, int]]] = {}
        self._can_dig = True
        self._scheduled = False
        self._mutex = Lock()  # of the debt
        self._working = Lock()  # one digs at a time
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvwise-disk-janitor")
        self._closed = False
        self._zeros = aligned(_ZEROS)
        self.debt_bytes = 0

    def bury(self, places: Sequence[Place], *, wipe: bool = False) -> list[OSError | None]:
        """Write tombstones over records that left the index, over zeros if `wipe`; why it failed for each."""
        errors: list[OSError | None] = [None] * len(places)
        if wipe:
            self._on_each(places, errors, self._overwrite)
            self._sync(places, errors)
        self._on_each(places, errors, lambda fd, p: write_all(self._system, fd, tombstone(p.num_bytes), p.offset))
        if wipe:
            self._sync(places, errors)
        for place, error in zip(places, errors, strict=True):
            if error is None:
                self.add(place.segment, place.offset, place.num_bytes)
            else:  # it may turn up again after a restart; until then its bytes count
                place.segment.flawed = True
                place.segment.stuck_bytes += place.num_bytes
        return errors

    def _on_each(self, places: Sequence[Place], errors: list[OSError | None], do: Callable[[int, Place], None]) -> None:
        for number, place in enumerate(places):
            if errors[number] is not None:
                continue
            try:
                with self._handles.use(place.segment.name) as fd:
                    do(fd, place)
            except FileNotFoundError:  # dead already, with its file
                self._index.forget_segments([place.segment])
            except OSError as error:
                errors[number] = error

    def _overwrite(self, fd: int, place: Place) -> None:
        for offset in range(place.offset + PAGE, place.offset + place.num_bytes, len(self._zeros)):
            rest = place.offset + place.num_bytes - offset
            write_all(self._system, fd, self._zeros[:rest], offset)

    def _sync(self, places: Sequence[Place], errors: list[OSError | None]) -> None:
        last = {place.segment: place for place in places}
        failed: list[OSError | None] = [None] * len(last)
        self._on_each(list(last.values()), failed, lambda fd, _: self._system.fdatasync(fd))
        reasons = dict(zip(last, failed, strict=True))
        for number, place in enumerate(places):
            errors[number] = errors[number] or reasons[place.segment]

    def add(self, segment: Segment, offset: int, num_bytes: int) -> None:
        """These bytes of the segment are dead; `settle` is what gives them back. 0 bytes: look at the file only."""
        with self._mutex:
            self._debt.setdefault(segment, []).append((offset, num_bytes))
            self.debt_bytes += num_bytes

    def settle_soon(self) -> None:
        """Settle in the background."""
        if self.debt_bytes > _MOST_DEBT:  # who deletes faster than the disk forgets waits for it
            self.settle()
        with self._mutex:
            if not self._scheduled and not self._closed and self._debt:
                self._scheduled = True
                self._pool.submit(self._background)

    def _background(self) -> None:
        with self._mutex:
            self._scheduled = False
        self.settle()

    def settle(self) -> None:
        """Give back all that is owed now."""
        with self._working:
            with self._mutex:
                debt, self._debt, self.debt_bytes = self._debt, {}, 0
            for segment, ranges in debt.items():
                if not self._remove(segment):
                    self._dig(segment, merged(ranges))

    def _dig(self, segment: Segment, ranges: list[tuple[int, int]]) -> None:
        try:
            with self._handles.use(segment.name) as fd:
                for offset, num_bytes in ranges:
                    if not self._can_dig:
                        segment.stuck_bytes += num_bytes
                        continue
                    try:
                        self._system.punch(fd, offset, num_bytes)
                    except OSError as error:
                        self._can_dig = error.errno not in NO_HOLES
                        segment.stuck_bytes += num_bytes
        except FileNotFoundError:
            self._index.forget_segments([segment])
        except OSError:
            segment.stuck_bytes += sum(num_bytes for _, num_bytes in ranges)

    def _remove(self, segment: Segment) -> bool:
        """Remove the file if nothing in it lives and nobody appends to it."""
        if segment.num_live or segment.flawed:
            return False
        try:
            fd = self._folder.open(segment.name)
        except FileNotFoundError:
            self._gone(segment)
            return True
        except OSError:
            return False
        try:
            if not self._system.lock(fd) or os.fstat(fd).st_size > segment.end or segment.num_live:
                return False  # in use, or grown by what we have not seen
            self._system.unlink(segment.name, self._folder.fd)
        except OSError as error:
            if error.errno != errno.ENOENT:
                return False
        finally:
            os.close(fd)
        self._gone(segment)
        return True

    def _gone(self, segment: Segment) -> None:
        self._index.forget_segments([segment])
        self._handles.drop(segment.name)

    def close(self) -> None:
        """Settle, and end the thread."""
        with self._mutex:
            self._closed = True
        self._pool.shutdown(wait=True)
        self.settle()


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, bytes) ranges with neighbours put together."""
    joined: list[tuple[int, int]] = []
    for offset, num_bytes in sorted(ranges):
        if joined and offset <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(sum(joined[-1]), offset + num_bytes) - joined[-1][0])
        elif num_bytes:
            joined.append((offset, num_bytes))
    return joined
