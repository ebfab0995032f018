"""Records for tests of tiers: small, seeded, and told apart by their number."""

from dataclasses import replace
from hashlib import sha256

import numpy as np

from kvwise.tiers.base import Buffer
from kvwise.tiers.record import Header, open_record, seal

IDENTITY = sha256(b"identity").digest()
CODEC = "raw"


def key_of(number: int) -> bytes:
    """The key of sample record `number`."""
    return sha256(b"key %d" % number).digest()


def header_of(number: int, **changes: object) -> Header:
    """Its header, without segments."""
    header = Header(key_of(number), key_of(number - 1), IDENTITY, CODEC, 16, number, 1.0e9 + number, 2.0e9, 60.0)
    return replace(header, **changes)  # type: ignore[arg-type]


def pieces_of(number: int, num_segments: int = 2, segment_bytes: int = 200, *, seed: int = 0) -> list[Buffer]:
    """A sealed record in pieces; another seed is another content under the same key."""
    rng = np.random.default_rng((seed, number))
    segments = [
        (rng.bytes(segment_bytes // 3), rng.bytes(segment_bytes - segment_bytes // 3)) for _ in range(num_segments)
    ]
    return seal(header_of(number), segments)


def record_of(number: int, num_segments: int = 2, segment_bytes: int = 200, *, seed: int = 0) -> bytes:
    """The same record in one run of bytes."""
    return b"".join(pieces_of(number, num_segments, segment_bytes, seed=seed))


def is_sound(record: Buffer, number: int) -> bool:
    """Whether the bytes would be served for `key_of(number)`."""
    return isinstance(open_record(record, key_of(number), IDENTITY, CODEC), tuple)
