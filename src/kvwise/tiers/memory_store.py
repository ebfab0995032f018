"""The reference store: records in a dict. What it answers is what every other store must answer."""

from collections.abc import Iterator, Sequence
from threading import Lock

from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind


class MemoryStore:
    """A `ByteStore` that keeps each record as a buffer of its own, at most `capacity_bytes` of them (None: any)."""

    persistent = False
    wipes = True

    def __init__(self, capacity_bytes: int | None = None, *, name: str = "memory") -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._records: dict[bytes, bytearray] = {}
        self._num_bytes = 0
        self._closed = False
        self._mutex = Lock()

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """See `ByteStore.write`; a record that does not fit leaves an older one of its key as it is."""
        return [self._write(key, pieces) for key, pieces in records]

    def _write(self, key: bytes, pieces: Sequence[Buffer]) -> Fault | None:
        record = bytearray().join(pieces)
        with self._mutex:
            if self._closed:
                return self._off()
            num_bytes = self._num_bytes + len(record) - len(self._records.get(key, b""))
            if self.capacity_bytes is not None and num_bytes > self.capacity_bytes:
                return Fault(FaultKind.FULL, f"{len(record)} bytes more than {self.capacity_bytes - self._num_bytes}")
            self._records[key] = record
            self._num_bytes = num_bytes
        return None

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """See `ByteStore.read`; views stay valid for good, but a wiped record turns to zeros under them."""
        with self._mutex:
            if self._closed:
                return [self._off() for _ in extents]
            found = [self._records.get(extent.key) for extent in extents]
        return [
            Fault(FaultKind.MISSING) if record is None else memoryview(record).toreadonly()[extent.start : extent.stop]
            for extent, record in zip(extents, found, strict=True)
        ]

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """See `ByteStore.delete`."""
        with self._mutex:
            if self._closed:
                return [self._off() for _ in keys]
            for key in keys:
                record = self._records.pop(key, None)
                if record is None:
                    continue
                self._num_bytes -= len(record)
                if wipe:
                    record[:] = bytes(len(record))
        return [None for _ in keys]

    def scan(self) -> Iterator[memoryview]:
        """See `ByteStore.scan`; the whole records."""
        with self._mutex:
            records = [] if self._closed else list(self._records.values())
        return (memoryview(record).toreadonly() for record in records)

    def num_bytes(self) -> int:
        """Bytes of all records."""
        return self._num_bytes

    def close(self) -> None:
        """Forget everything; further calls answer with OFF."""
        with self._mutex:
            self._closed = True
            self._records.clear()
            self._num_bytes = 0

    def _off(self) -> Fault:
        return Fault(FaultKind.OFF, f"{self.name} is closed")
