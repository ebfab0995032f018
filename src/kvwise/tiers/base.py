"""The seam of tiers: where records of KV rest below the device, and what can go wrong on the way back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview


class FaultKind(StrEnum):
    """Why bytes did not come back, or were not kept. Every one is a miss; none is an error of the request."""

    MISSING = "not there"  # deleted between look-up and read, or never written
    CORRUPT = "corrupt"  # a checksum, a length or the framing is wrong
    FOREIGN = "foreign"  # another key, model, codec or version than was asked for
    IO_ERROR = "i/o error"  # the medium or the network said no
    FULL = "full"  # no space, out of memory, read-only, larger than the tier takes
    LATE = "late"  # not within the deadline
    OFF = "off"  # the tier's breaker is open, or the tier is closed


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that went wrong: its kind, and a line for the log (no prompt text, no keys of users)."""

    kind: FaultKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else str(self.kind)


class Extent(NamedTuple):
    """Bytes [start, stop) of the record under `key`; stop None is its end."""

    key: bytes
    start: int = 0
    stop: int | None = None


class ByteStore(Protocol):
    """Keeps records under 32-byte keys in one place. Not a cache: it drops nothing by itself.

    What stays, what leaves and when is decided above (cache/residency.py); here are only bytes. A record is opaque
    except that it starts with the header of `record.py`, which names its key and its length. All methods may be
    called from several threads at once. Nothing is raised for a fault of the medium: it is a `Fault` in the answer,
    one for each item, so that a bad block does not take its neighbours along.
    """

    name: str
    persistent: bool  # whether records outlive this process
    wipes: bool  # whether `delete(wipe=True)` overwrites the bytes; where not, a purge must say that it only deleted

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """Keep each (key, pieces of the record in order); None where it is kept. A key that is there is replaced."""
        ...

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """The bytes of each extent, cut at the end of its record. Unverified: `record.open` does that.

        A view is valid until the next read of the same thread on the same store: buffers are used again, because
        fresh memory costs a page fault every 4 KiB.
        """
        ...

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """Forget records; `wipe` overwrites their bytes first where the medium allows. An absent key is no fault."""
        ...

    def scan(self) -> Iterator[memoryview]:
        """The header bytes (at least `record.header_bytes` of them) of every whole record, in any order.

        For rebuilding an index at start. What is torn or foreign is dropped and removed on the way.
        """
        ...

    def num_bytes(self) -> int:
        """Bytes the records take now, on the medium where that can be told."""
        ...

    def close(self) -> None:
        """End what runs in the background; persistent records stay. Further calls answer with OFF."""
        ...
