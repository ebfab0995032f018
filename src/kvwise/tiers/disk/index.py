"""The index of a disk tier: which record is where. Rebuilt from the files; never written."""

from collections.abc import Collection
from threading import Lock

from kvwise.tiers.disk.segment import Place, Segment


class Index:
    """Places by key, and the count of what lives in each segment. Safe to use from several threads.

    A key has one place that is read, and spare ones: copies that other processes wrote, or that a crash left between
    writing a record anew and deleting its former one. They count, and are deleted together.
    """

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        self._places: dict[bytes, Place] = {}
        self._spares: dict[bytes, list[Place]] = {}
        self._taken: set[tuple[str, int]] = set()  # what was deleted while a walk is under way
        self._num_walks = 0
        self._mutex = Lock()

    def place_of(self, key: bytes) -> Place | None:
        """Where the record of a key is read."""
        return self._places.get(key)

    def num_bytes(self) -> int:
        """Bytes of all live records, and of dead ones that could not be handed back."""
        with self._mutex:
            return sum(segment.live_bytes + segment.stuck_bytes for segment in self.segments.values())

    def segment(self, name: str) -> Segment:
        """The segment of that name, known from now on."""
        with self._mutex:
            return self.segments.setdefault(name, Segment(name))

    def put(self, key: bytes, place: Place) -> list[Place]:
        """Read `key` there from now on; the places it had before, which are to be buried."""
        with self._mutex:
            former = self._pop(key)
            self._places[key] = place
            self._count(place, 1)
            return former

    def put_spare(self, key: bytes, place: Place) -> bool:
        """A further place of `key`; whether it is the one that is read, because there was none. Known ones are kept."""
        with self._mutex:
            if (place.segment.name, place.offset) in self._taken:
                return False
            if key not in self._places:
                self._places[key] = place
            elif place == self._places[key] or place in self._spares.get(key, ()):
                return False
            else:
                self._spares.setdefault(key, []).append(place)
            self._count(place, 1)
            return self._places[key] is place

    def take(self, key: bytes) -> list[Place]:
        """Forget a key; the places it had, which are to be buried."""
        with self._mutex:
            return self._pop(key)

    def forget(self, key: bytes, place: Place) -> None:
        """The record is no longer there: a spare takes its place if there is one."""
        with self._mutex:
            self._forget(key, place)

    def forget_segments(self, gone: Collection[Segment]) -> None:
        """The files are gone, and everything in them."""
        with self._mutex:
            gone = {segment for segment in gone if self.segments.pop(segment.name, None) is segment}
            if not gone:
                return
            lost = [(key, place) for key, place in self._places.items() if place.segment in gone]
            lost += [(key, p) for key, spares in self._spares.items() for p in spares if p.segment in gone]
            for key, place in lost:
                self._forget(key, place)

    def begin_walk(self) -> dict[Segment, tuple[int, dict[int, bytes]]]:
        """What is known of each segment now: its end, and the key at each offset. To compare with what is there."""
        with self._mutex:
            self._num_walks += 1
            known: dict[Segment, tuple[int, dict[int, bytes]]] = {s: (s.end, {}) for s in self.segments.values()}
            for key, place in self._places.items():
                for one in (place, *self._spares.get(key, ())):
                    known[one.segment][1][one.offset] = key
            return known

    def end_walk(self) -> None:
        """Deletions need not be remembered any longer."""
        with self._mutex:
            self._num_walks -= 1
            if not self._num_walks:
                self._taken.clear()

    def places_of(self, key: bytes) -> list[Place]:
        """All places of a key, the one that is read first."""
        with self._mutex:
            place = self._places.get(key)
            return [place, *self._spares.get(key, ())] if place else []

    def at(self, key: bytes, segment: Segment, offset: int) -> Place | None:
        """The place of `key` at that offset, if it has one there."""
        for place in self.places_of(key):
            if place.segment is segment and place.offset == offset:
                return place
        return None

    def _pop(self, key: bytes) -> list[Place]:
        place = self._places.pop(key, None)
        former = [place, *self._spares.pop(key, ())] if place else []
        for one in former:
            self._count(one, -1)
            if self._num_walks:
                self._taken.add((one.segment.name, one.offset))
        return former

    def _forget(self, key: bytes, place: Place) -> None:
        spares = self._spares.get(key, [])
        if place in spares:
            spares.remove(place)
        elif self._places.get(key) == place:
            if spares:
                self._places[key] = spares.pop(0)
            else:
                del self._places[key]
        else:
            return
        if not spares:
            self._spares.pop(key, None)
        self._count(place, -1)

    @staticmethod
    def _count(place: Place, sign: int) -> None:
        place.segment.num_live += sign
        place.segment.live_bytes += sign * place.num_bytes
