"""Making the index agree with the files: all of them at start, what others appended from time to time."""

import os
from collections.abc import Generator, Iterable
from threading import Lock

from kvwise.tiers.disk.buffers import aligned
from kvwise.tiers.disk.folder import Folder, Handles
from kvwise.tiers.disk.index import Index
from kvwise.tiers.disk.janitor import Janitor
from kvwise.tiers.disk.segment import Found, Place, Segment, Walk, pages
from kvwise.tiers.disk.system import System
from kvwise.tiers.record import Header, read_header

_Known = tuple[int, dict[int, bytes]]


class Scanner:
    """Walks through segments. A file that nobody appends to is also cleaned: what is torn in it is handed back."""

    def __init__(
        self, system: System, folder: Folder, handles: Handles, index: Index, janitor: Janitor, walking: Lock
    ) -> None:
        self._system, self._folder, self._handles = system, folder, handles
        self._index, self._janitor = index, janitor
        self._walking = walking  # one looks at the files at a time

    def scan(self) -> Generator[list[Found], None, None]:
        """Walk through everything; the records of one segment after another, each key at its newest place.

        A second copy of a key is what a crash left between writing a record anew and deleting the old one: the one
        stored later stays. If the later one turns up later, its key comes twice and the last holds.
        """
        known = self._index.begin_walk()
        try:
            sizes = self._sizes()
            for name, size in sizes.items():
                with self._walking:
                    found = self._reconcile(self._index.segment(name), size, known)
                yield found
            self._gone(segment for segment in known if segment.name not in sizes)
        finally:
            self._index.end_walk()
            self._janitor.settle_soon()

    def refresh(self) -> list[Found]:
        """Look only at what other processes appended or removed since; the records that are new here."""
        fresh: list[Found] = []
        with self._walking:
            before = list(self._index.segments.values())
            sizes = self._sizes()
            self._gone(segment for segment in before if segment.name not in sizes)
            for name, size in sizes.items():
                segment = self._index.segment(name)
                if size > segment.end and not segment.writing:
                    fresh += self._enter(segment, self._walk(segment, segment.end, size))
        self._janitor.settle_soon()
        return fresh

    def _sizes(self) -> dict[str, int]:
        """Bytes of each segment, without those that this process is just creating."""
        return {
            name: status.st_size
            for name, status in self._folder.segments().items()
            if name in self._index.segments or not self._folder.is_own(name)
        }

    def _gone(self, segments: Iterable[Segment]) -> None:
        gone = list(segments)
        self._index.forget_segments(gone)
        for segment in gone:
            self._handles.drop(segment.name)

    def _reconcile(self, segment: Segment, size: int, known: dict[Segment, _Known]) -> list[Found]:
        end, keys = known.get(segment, (0, {}))
        stop = end if segment.mine else size  # what we append meanwhile is in the index already
        walk = self._walk(segment, 0, stop, whole=True)
        if walk is None:
            return []
        there = {found.offset: found.header.key for found in walk.found}
        for offset, key in keys.items():
            if offset < stop and there.get(offset) != key and not walk.num_errors:
                place = self._index.at(key, segment, offset)
                if place is not None:
                    self._index.forget(key, place)
        return self._settle_copies(segment, self._enter(segment, walk, again=True))

    def _walk(self, segment: Segment, start: int, size: int, *, whole: bool = False) -> Walk | None:
        """Walk, and clean up behind it where nobody else may be writing.

        The end of a segment of ours that is looked through as a `whole` is known better than this sees it.
        """
        try:
            fd = self._folder.open(segment.name)
        except FileNotFoundError:
            self._gone([segment])
            return None
        except OSError:
            segment.flawed = True
            return None
        try:
            alone = not segment.mine and self._system.lock(fd)
            if alone:
                size = max(size, os.fstat(fd).st_size)  # the last that its owner wrote
            walk = Walk(self._system, fd, start, size)
            if walk.num_errors:
                segment.flawed = True
            elif alone:
                for offset, num_bytes in walk.dead + walk.junk:
                    self._janitor.add(segment, offset, min(num_bytes, pages(size) - offset))
                self._janitor.add(segment, 0, 0)  # perhaps nothing lives in it
            if not (whole and segment.mine):
                torn = None if alone else walk.junk_at_end
                segment.end = pages(size) if torn is None else torn
            return walk
        finally:
            os.close(fd)

    def _enter(self, segment: Segment, walk: Walk | None, *, again: bool = False) -> list[Found]:
        """Enter what a walk found; those that were new, or all that are in the index if `again`."""
        fresh = []
        for found in walk.found if walk is not None else ():
            place = Place(segment, found.offset, found.header.record_bytes)
            if self._index.put_spare(found.header.key, place) or (
                again and self._index.at(found.header.key, segment, found.offset)
            ):
                fresh.append(found)
        return fresh

    def _settle_copies(self, segment: Segment, entered: list[Found]) -> list[Found]:
        """Of keys with several places only the newest stays; the records of this segment that did."""
        stay = []
        for found in entered:
            key = found.header.key
            places = self._index.places_of(key)
            if len(places) > 1:
                newest = max(places, key=self._age)
                former = [place for place in places if place != newest]
                for place in former:
                    self._index.forget(key, place)
                self._janitor.bury(former)
                if newest.segment is not segment or newest.offset != found.offset:
                    continue
            stay.append(found)
        return stay

    def _age(self, place: Place) -> tuple[float, str, int]:
        """Orders copies of a record: by when they were stored, then by any order that every process agrees on."""
        buffer = aligned(pages(1 << 15))
        header = None
        try:
            with self._handles.use(place.segment.name) as fd:
                header = read_header(buffer[: self._system.preadv(fd, [buffer], place.offset)])
        except OSError:
            pass  # it cannot be read: the other one stays
        stored_at = header.stored_at if isinstance(header, Header) else float("-inf")
        return stored_at, place.segment.name, place.offset
