"""Records: what was sealed opens again; one bit, byte or field that is not as it was written is a miss."""

import struct
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from kvwise.tiers.base import Fault, FaultKind
from kvwise.tiers.record import (
    ALIGNMENT,
    Header,
    check_segment,
    cut,
    header_bytes,
    open_record,
    pack_fixed,
    pack_header,
    read_header,
    record_bytes,
    seal,
)
from tests.tiers.samples import CODEC, IDENTITY, header_of, key_of, record_of

KEYS = st.binary(min_size=32, max_size=32)
TAGS = st.binary(min_size=16, max_size=16)
SECONDS = st.floats(0, 1e12) | st.just(inf)
HEADERS = st.builds(
    Header,
    key=KEYS,
    parent=KEYS,
    identity=KEYS,
    codec=st.text(st.characters(codec="ascii", exclude_characters="\x00"), max_size=64),
    num_tokens=st.integers(0, 2**16 - 1),
    depth=st.integers(0, 2**32 - 1),
    stored_at=st.floats(0, 1e12),
    expires_at=SECONDS,
    idle_s=SECONDS,
    tenant=TAGS,
    session=TAGS,
)


def open_sample(record: bytes, number: int) -> Fault | tuple[Header, list[memoryview]]:
    return open_record(record, key_of(number), IDENTITY, CODEC)


@settings(max_examples=60)
@given(HEADERS, st.lists(st.lists(st.binary(max_size=90), max_size=3), min_size=1, max_size=5))
def test_what_was_sealed_opens_again(header: Header, segments: list[list[bytes]]) -> None:
    record = b"".join(seal(header, segments))
    opened = open_record(record, header.key, header.identity, header.codec)
    assert not isinstance(opened, Fault)
    found, views = opened
    assert replace(found, segments=()) == header
    assert [bytes(view) for view in views] == [b"".join(pieces) for pieces in segments]
    assert found.record_bytes == len(record) == record_bytes([len(view) for view in views])
    assert found.header_bytes == header_bytes(len(segments))
    for index, view in enumerate(views):
        start, stop = found.segment_range(index)
        assert start % ALIGNMENT == 0
        assert record[start:stop] == bytes(view)
        assert check_segment(found, index, record[start:stop]) is None


def test_sealing_copies_no_segment() -> None:
    data = bytearray(b"a" * 100)
    pieces = seal(header_of(1), [[data, memoryview(data)]])
    assert pieces[1] is data
    assert isinstance(pieces[2], memoryview)
    assert pieces[2].obj is data


def test_every_flipped_bit_is_a_miss() -> None:
    record = bytearray(record_of(1, num_segments=3, segment_bytes=70))
    for position in range(8 * len(record)):
        record[position // 8] ^= 1 << position % 8
        assert isinstance(open_sample(bytes(record), 1), Fault), f"bit {position}"
        record[position // 8] ^= 1 << position % 8
    assert not isinstance(open_sample(bytes(record), 1), Fault)


def test_every_truncation_is_a_miss_and_so_is_every_excess() -> None:
    record = record_of(1, num_segments=3, segment_bytes=70)
    for length in range(len(record)):
        fault = open_sample(record[:length], 1)
        assert isinstance(fault, Fault)
        assert fault.kind == FaultKind.CORRUPT
        assert isinstance(read_header(record[:length]), Fault) == (length < header_bytes(3))
    assert isinstance(open_sample(record + b"\x00", 1), Fault)
    assert isinstance(open_sample(record + bytes(64), 1), Fault)


def test_swapped_records_are_foreign() -> None:
    for number, asked in ((1, 2), (2, 1)):
        fault = open_sample(record_of(number), asked)
        assert isinstance(fault, Fault)
        assert fault.kind == FaultKind.FOREIGN


@pytest.mark.parametrize("field", ["identity", "codec", "version"])
def test_another_identity_codec_or_version_is_foreign(field: str) -> None:
    record = bytearray(record_of(1))
    codec, identity = CODEC, IDENTITY
    if field == "version":
        record[7] = 2
    elif field == "codec":
        codec = "raw2"
    else:
        identity = key_of(3)
    fault = open_record(record, key_of(1), identity, codec)
    assert isinstance(fault, Fault)
    assert fault.kind == FaultKind.FOREIGN


def test_segments_that_changed_places_are_a_miss() -> None:
    record = record_of(1, num_segments=2, segment_bytes=128)
    start = header_bytes(2)
    swapped = record[:start] + record[start + 128 :] + record[start : start + 128]
    assert len(swapped) == len(record)
    assert isinstance(open_sample(swapped, 1), Fault)


def test_segments_of_another_record_of_the_key_are_a_miss() -> None:
    old, new = record_of(1, seed=1), record_of(1, seed=2)
    start = header_bytes(2)
    assert isinstance(open_sample(old[:start] + new[start:], 1), Fault)


def forged(record: bytes, offset: int, value: bytes, num_segments: int = 2) -> bytes:
    """The record with bytes of its header replaced and the header's checksum made right again."""
    end = 276 + 24 * num_segments
    body = record[:offset] + value + record[offset + len(value) : end]
    return body + xxh3_128_digest(body) + record[end + 16 :]


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (16, struct.pack("<Q", 1 << 40)),  # bytes of the record
        (276, struct.pack("<Q", 1 << 63)),  # bytes of a segment
        (12, struct.pack("<H", 1024)),  # number of segments
        (12, struct.pack("<H", 0)),
        (120, b"\xff"),  # the codec's name
        (248, struct.pack("<d", nan)),
        (256, struct.pack("<d", nan)),
        (264, struct.pack("<d", nan)),
    ],
)
def test_a_forged_header_is_a_fault_and_no_exception(offset: int, value: bytes) -> None:
    fault = read_header(forged(record_of(1), offset, value))
    assert isinstance(fault, Fault)
    assert fault.kind == FaultKind.CORRUPT


def test_forging_without_a_change_still_opens() -> None:
    assert not isinstance(open_sample(forged(record_of(1), 0, record_of(1)[:8]), 1), Fault)


@given(st.binary(max_size=600))
def test_noise_is_a_fault_and_no_exception(noise: bytes) -> None:
    for data in (noise, record_of(1)[:8] + noise, record_of(1)[:14] + noise):
        assert isinstance(read_header(data), Fault)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="64 ASCII"):
        pack_header(header_of(1, codec="c" * 65), [(1, bytes(16))])
    with pytest.raises(ValueError, match="ASCII"):
        pack_header(header_of(1, codec="é"), [(1, bytes(16))])
    with pytest.raises(ValueError, match="32 bytes"):
        pack_header(header_of(1, key=b"short"), [(1, bytes(16))])
    with pytest.raises(ValueError, match="1 to 1024"):
        seal(header_of(1), [])
    with pytest.raises(ValueError, match="1 to 1024"):
        pack_fixed(header_of(1), 1025, 1 << 20)


def test_cut_does_not_verify_but_looks_at_lengths_and_paddings() -> None:
    record = bytearray(record_of(1, 2, 70))
    header = read_header(record)
    assert isinstance(header, Header)
    record[header_bytes(2)] ^= 1
    segments = cut(record, header)
    assert not isinstance(segments, Fault)
    assert isinstance(check_segment(header, 0, segments[0]), Fault)
    assert check_segment(header, 1, segments[1]) is None
    record[header_bytes(2) + 70] ^= 1
    assert isinstance(cut(record, header), Fault)


def test_a_header_is_read_from_a_copy() -> None:
    """Another thread may write to the memory: what was checked is what is returned."""
    record = bytearray(record_of(1))
    header = read_header(record)
    assert isinstance(header, Header)
    record[:] = bytes(len(record))
    assert header.key == key_of(1)
    assert all(isinstance(digest, bytes) for _, digest in header.segments)
