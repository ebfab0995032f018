"""A record: one block of KV at rest, cut into segments (one per layer), with everything needed to refuse it.

```
header   fixed fields, a table of segments (length, xxh3-128 of its bytes), xxh3-128 of all of that; padded to 64
segment  layer 0: keys and values as the codec wrote them; padded to 64
segment  layer 1 ...
```

The header names the block's key, the identity the key was made under, the codec and its level, the owner and the
deadlines, so that nothing has to be believed: a record that was moved, swapped, cut, or written by another model or
version is told apart by itself. Segments are checked one by one, so that a layer can be used before the next arrives.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, isnan

from xxhash import xxh3_128, xxh3_128_digest

from kvwise.tiers.base import Buffer, Fault, FaultKind

MAGIC = b"KVWISE\x00\x01"
ALIGNMENT = 64
_FIXED = struct.Struct("<8sIHHQ32s32s32s64s16s16s32sdddI")
_START = struct.Struct("<8sIH")  # the first three of them
_SEGMENT = struct.Struct("<Q16s")
_DIGEST_BYTES = 16
_CODEC_BYTES = 64
_NAME_BYTES = 4 * 32 + 2 * 16  # key, parent, identity, probe, tenant, session
_MAX_SEGMENTS = 1024
_MAX_RECORD_BYTES = 1 << 34
NO_TAG = bytes(16)  # the record belongs to no tenant, or to no session
NO_PROBE = bytes(32)


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself.

    `key`, `parent` and `identity` are 32 bytes: the block's key, that of the block before it (or its chain's root),
    and the root of the unsalted identity. `probe`: of a first block, a digest of its tokens alone, so that a miss can
    tell that another model has them; else zeros. `codec` prints codec and level. `tenant` and `session` are 16-byte
    tags of who stored it. `stored_at` and `expires_at` are Unix seconds of the wall clock (they must mean something
    after a restart), `idle_s` the seconds it may go unused; infinity is "never". `depth` is the block's index in its
    chain. `segments` are (length in bytes, digest).
    """

    key: bytes
    parent: bytes
    identity: bytes
    codec: str
    num_tokens: int
    depth: int
    stored_at: float
    expires_at: float = inf
    idle_s: float = inf
    tenant: bytes = NO_TAG
    session: bytes = NO_TAG
    probe: bytes = NO_PROBE
    segments: tuple[tuple[int, bytes], ...] = field(default=())

    @property
    def header_bytes(self) -> int:
        """Bytes before the first segment."""
        return header_bytes(len(self.segments))

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return record_bytes([length for length, _ in self.segments])

    def segment_range(self, index: int) -> tuple[int, int]:
        """Bytes [start, stop) of a segment in the record, without its padding."""
        start = self.header_bytes + sum(padded(length) for length, _ in self.segments[:index])
        return start, start + self.segments[index][0]


def header_bytes(num_segments: int) -> int:
    """Bytes of the header of a record with so many segments."""
    return padded(_FIXED.size + num_segments * _SEGMENT.size + _DIGEST_BYTES)


def record_bytes(segment_lengths: Sequence[int]) -> int:
    """Bytes of a record whose segments have these lengths."""
    return header_bytes(len(segment_lengths)) + sum([-(-length // ALIGNMENT) for length in segment_lengths]) * ALIGNMENT


def seal(header: Header, segments: Sequence[Sequence[Buffer]]) -> list[Buffer]:
    """The pieces of a record, in order: header, segments (each given in pieces itself), paddings. Copies nothing.

    The table of segments is made here; that of `header` is not read.
    """
    table = [_entry(pieces) for pieces in segments]
    body = [p for pieces, (length, _) in zip(segments, table, strict=True) for p in (*pieces, *_padding(length))]
    return [pack_header(header, table), *body]


def pack_header(header: Header, table: Sequence[tuple[int, bytes]]) -> bytes:
    """The header's bytes, for segments whose lengths and digests are known."""
    fixed = pack_fixed(header, len(table), record_bytes([length for length, _ in table]))
    body = fixed + b"".join(_SEGMENT.pack(length, digest) for length, digest in table)
    return (body + xxh3_128_digest(body)).ljust(header_bytes(len(table)), b"\x00")


def pack_fixed(header: Header, num_segments: int, num_bytes: int) -> bytes:
    """The header's bytes before the table, of a record of `num_bytes`. ValueError for what could not be read back."""
    key, parent, identity = header.key, header.parent, header.identity
    names = (key, parent, identity, header.probe, header.tenant, header.session)
    if sum(map(len, names)) != _NAME_BYTES:
        raise ValueError("key, parent, identity and probe have 32 bytes each, tenant and session 16")
    if not 0 < num_segments <= _MAX_SEGMENTS or num_bytes > _MAX_RECORD_BYTES:
        raise ValueError(f"a record has 1 to {_MAX_SEGMENTS} segments and at most {_MAX_RECORD_BYTES} bytes")
    return _FIXED.pack(
        MAGIC, header_bytes(num_segments), num_segments, header.num_tokens, num_bytes, key, parent, identity,
        pack_codec(header.codec), header.tenant, header.session, header.probe, header.stored_at, header.expires_at,
        header.idle_s, header.depth,
    )  # fmt: skip


@lru_cache(64)
def pack_codec(codec: str) -> bytes:
    """The header's field for a codec and level, 64 bytes. ValueError for a spec that does not fit into it."""
    if len(codec) > _CODEC_BYTES or not codec.isascii():
        raise ValueError(f"a codec is printed in at most {_CODEC_BYTES} ASCII characters, not as {codec!r}")
    return codec.encode("ascii").ljust(_CODEC_BYTES, b"\x00")


def read_header(view: Buffer) -> Header | Fault:
    """The header at the start of `view`, if every byte of it (padding included) is as it was written."""
    # A copy: where another thread may reuse the memory, what was checked must be what is read.
    data = _copy_header(memoryview(view).cast("B"))
    if isinstance(data, Fault):
        return data
    (_, size, count, num_tokens, num_bytes, key, parent, identity, codec, tenant, session, probe, stored_at,
     expires_at,      idle_s, depth) = _FIXED.unpack_from(data)  # fmt: skip
    end = _FIXED.size + count * _SEGMENT.size
    if data[end:] != xxh3_128_digest(data[:end]).ljust(size - end, b"\x00"):
        return Fault(FaultKind.CORRUPT, "the header's checksum is wrong")
    codec = codec.rstrip(b"\x00")
    if not codec.isascii() or isnan(stored_at + expires_at) or isnan(idle_s):  # a checksum can be forged
        return Fault(FaultKind.CORRUPT, "a field of the header has no meaning")
    segments = tuple(_SEGMENT.iter_unpack(data[_FIXED.size : end]))
    header = Header(
        key, parent, identity, codec.decode("ascii"), num_tokens, depth, stored_at, expires_at, idle_s, tenant,
        session, probe, segments,
    )  # fmt: skip
    if num_bytes > _MAX_RECORD_BYTES or header.record_bytes != num_bytes:
        return Fault(FaultKind.CORRUPT, f"segments do not add up to {num_bytes} bytes")
    return header


def _copy_header(data: memoryview) -> bytes | Fault:
    """The bytes of a header of a known format and a possible size."""
    fixed = bytes(data[: _FIXED.size])
    if len(fixed) < _FIXED.size:
        return Fault(FaultKind.CORRUPT, f"{len(fixed)} bytes are less than a header")
    magic, size, count = _START.unpack_from(fixed)
    if magic != MAGIC:
        known = magic[:7] == MAGIC[:7]
        return Fault(FaultKind.FOREIGN, f"format {magic[7]}") if known else Fault(FaultKind.CORRUPT, "no record")
    if not 0 < count <= _MAX_SEGMENTS or size != header_bytes(count) or len(data) < size:
        return Fault(FaultKind.CORRUPT, f"header of {size} bytes for {count} segments, {len(data)} there")
    return fixed + bytes(data[_FIXED.size : size])


def refuse(header: Header, key: bytes, identity: bytes, codec: str) -> Fault | None:
    """Why a sound record is not the one that was asked for, or None if it is."""
    for name, found, wanted in (
        ("key", header.key, key),
        ("identity", header.identity, identity),
        ("codec", header.codec, codec),
    ):
        if found != wanted:
            return Fault(FaultKind.FOREIGN, f"another {name}")
    return None


def check_segment(header: Header, index: int, data: Buffer) -> Fault | None:
    """Why these bytes are not segment `index`, or None if they are."""
    length, digest = header.segments[index]
    view = memoryview(data).cast("B")
    if len(view) != length:
        return Fault(FaultKind.CORRUPT, f"segment {index} has {len(view)} of {length} bytes")
    if xxh3_128_digest(view) != digest:
        return Fault(FaultKind.CORRUPT, f"segment {index}: the checksum is wrong")
    return None


def open_record(view: Buffer, key: bytes, identity: bytes, codec: str) -> tuple[Header, list[memoryview]] | Fault:
    """Header and verified segments of a whole record, or why it must not be used.

    The segments are views: if another thread may write to `view`, they are worth nothing (see `blocks.py` for that).
    """
    data = memoryview(view).cast("B")
    header = read_header(data)
    if isinstance(header, Fault):
        return header
    if fault := refuse(header, key, identity, codec):
        return fault
    segments = cut(data, header)
    if isinstance(segments, Fault):
        return segments
    for index, segment in enumerate(segments):
        if fault := check_segment(header, index, segment):
            return fault
    return header, segments


def cut(view: Buffer, header: Header) -> list[memoryview] | Fault:
    """The segments of a whole record, not verified yet; only lengths and paddings are."""
    data = memoryview(view).cast("B")
    if len(data) != header.record_bytes:
        return Fault(FaultKind.CORRUPT, f"{len(data)} of {header.record_bytes} bytes")
    segments = []
    position = header.header_bytes
    for index, (length, _) in enumerate(header.segments):
        segments.append(data[position : position + length])
        position += padded(length)
        if any(data[position - -length % ALIGNMENT : position]):
            return Fault(FaultKind.CORRUPT, f"segment {index}: padding is not empty")
    return segments


def padded(length: int) -> int:
    """`length` rounded up to the alignment of segments."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def _padding(length: int) -> list[Buffer]:
    return [bytes(missing)] if (missing := -length % ALIGNMENT) else []


def _entry(pieces: Sequence[Buffer]) -> tuple[int, bytes]:
    digest, length = xxh3_128(), 0
    for piece in pieces:
        digest.update(piece)
        length += memoryview(piece).nbytes
    return length, digest.digest()
