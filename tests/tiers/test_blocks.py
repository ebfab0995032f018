"""Blocks to records and back: bit for bit, or a fault; the native copies against the plain ones and against xxhash."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xxhash import xxh3_128_digest

from kvwise.core.errors import UsageError
from kvwise.tiers import blocks
from kvwise.tiers.base import Buffer, Fault, FaultKind
from kvwise.tiers.blocks import (
    RawRecord,
    layer_extent,
    restore_block,
    restore_blocks,
    restore_layer,
    seal_block,
    seal_blocks,
    write_raw,
)
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.fused import Copier, Shape, copier, copiers
from kvwise.tiers.record import Header, header_bytes, open_record, read_header
from tests.tiers.samples import IDENTITY, header_of, key_of

RAW = Raw()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = [name for name in copiers() if name != "plain"]


class Backwards:
    """A codec that is not raw: all bytes of a layer, last first. It can refuse what it reads."""

    name = "backwards"
    lossless = True
    levels = ("backwards",)

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        return [[b"B", b"".join(pieces)[::-1]] for pieces in RAW.encode(keys, values)]

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        data = bytes(segment)
        if data[:1] != b"B":
            raise ValueError("no B")
        RAW.decode(data[:0:-1], layer, keys, values)


@pytest.fixture(params=copiers())
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to copy, one after another, as the one that `blocks` uses."""
    chosen = request.param
    monkeypatch.setattr(blocks, "copier", lambda name=None, num_threads=1: copier(chosen, num_threads))
    return chosen


def random_blocks(
    num_blocks: int = 3, num_layers: int = 2, num_heads: int = 2, dim: int = 24, value_dim: int = 8, size: int = 4,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values of any bits, NaN included."""
    rng = np.random.default_rng(seed)
    shapes = [(num_blocks, num_layers, num_heads, size, d) for d in (dim, value_dim)]
    keys, values = (torch.from_numpy(rng.integers(0, 256, (*s[:-1], s[-1] * dtype.itemsize), np.uint8)) for s in shapes)
    return keys.view(dtype), values.view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def sealed(codec: Codec, keys: Tensor, values: Tensor, block: int) -> bytes:
    header = header_of(block, codec=codec.levels[0])
    return b"".join(seal_block(codec, 0, header, keys[block], values[block]))


def restore(record: Buffer, block: int, codec: Codec, keys: Tensor, values: Tensor, **asked: bytes) -> Header | Fault:
    key, identity = asked.get("key", key_of(block)), asked.get("identity", IDENTITY)
    return restore_block(record, key, identity, codec, 0, keys[block], values[block])


# copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("streaming", [False, True])
def test_native_digests_equal_xxhash_at_every_length(name: str, streaming: bool) -> None:
    from kvwise import _native

    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, 1 << 18, np.uint8)
    target = np.zeros(len(data) + 256, np.uint8)
    source, aligned = data.ctypes.data, -target.ctypes.data % 64
    lengths = [*range(4097), *rng.integers(4097, len(data), 60).tolist()]
    for length in lengths:
        shift = int(rng.integers(2)) * int(rng.integers(64))  # streaming needs alignment and must do without
        room = target[aligned + shift : aligned + shift + length + 8]
        room[:] = 0xAA
        cuts = [0, *sorted(rng.integers(0, length + 1, rng.integers(4)).tolist()), length]
        start = room.ctypes.data
        pieces = [(source + a, start + a, b - a) for a, b in pairwise(cuts)]
        wanted = xxh3_128_digest(data[:length].data)
        assert _native.copy_pieces(name.removeprefix("native-"), pieces, streaming) == wanted, f"{length}: {cuts}"
        assert np.array_equal(room[:length], data[:length])
        assert (room[length:] == 0xAA).all()  # nothing is written behind the end
        assert _native.copy_pieces(name.removeprefix("native-"), [(source, 0, length)], streaming) == wanted


@pytest.mark.parametrize("name", copiers())
@given(st.lists(st.binary(max_size=700), max_size=5), st.integers(0, 70))
@settings(max_examples=40)
def test_a_copy_digests_what_it_copied(name: str, parts: list[bytes], shift: int) -> None:
    sources = [np.frombuffer(part, np.uint8) for part in parts if part]
    target = np.zeros(sum(map(len, sources)) + shift + 1, np.uint8)
    pieces, position = [], target.ctypes.data + shift
    for source in sources:
        pieces.append((source.ctypes.data, position, len(source)))
        position += len(source)
    assert copier(name).copy(pieces) == xxh3_128_digest(b"".join(parts))
    assert target[shift:-1].tobytes() == b"".join(parts)


def test_a_copier_that_cannot_run_is_named() -> None:
    with pytest.raises(UsageError, match=r"'native-abacus'.*plain"):
        copier("native-abacus")


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_native_side_refuses_wrong_sizes() -> None:
    from kvwise import _native

    shape, fixed, room = [1, 64, 64, 64, 64], [bytes(276)], [memoryview(bytearray(448))]
    seal = _native.seal_blocks
    with pytest.raises(ValueError, match="5 fields"):
        seal("generic", [1, 2], fixed, [0], [0], room, False, 1)
    with pytest.raises(ValueError, match="1 to 1024 layers"):
        seal("generic", [0, 64, 64, 64, 64], fixed, [0], [0], room, False, 1)
    with pytest.raises(ValueError, match="276 bytes, not 1"):
        seal("generic", shape, [b"x"], [0], [0], room, False, 1)
    with pytest.raises(ValueError, match="bytes, not 1"):
        seal("generic", shape, fixed, [0], [0], [memoryview(bytearray(1))], False, 1)
    with pytest.raises(ValueError, match="one number"):
        seal("generic", shape, fixed, [], [0], room, False, 1)
    with pytest.raises(BufferError):
        seal("generic", shape, fixed, [0], [0], [memoryview(bytes(448))], False, 1)
    with pytest.raises(ValueError, match="a key must have 32"):
        _native.open_blocks("generic", shape, room, [b"k"], bytes(32), bytes(64), [0], [0], False, 1)
    with pytest.raises(ValueError, match="identity has 32"):
        _native.open_blocks("generic", shape, room, [bytes(32)], b"", bytes(64), [0], [0], False, 1)
    with pytest.raises(ValueError, match="cannot run"):
        _native.copy_pieces("abacus", [], False)
    with pytest.raises(ValueError, match="-1 bytes"):
        _native.copy_pieces("generic", [(0, 0, -1)], False)


# round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_comes_back_bit_for_bit(each: str, codec: Codec, dtype: torch.dtype) -> None:
    keys, values = random_blocks(dtype=dtype)
    record = sealed(codec, keys, values, 1)
    out = torch.zeros_like(keys), torch.zeros_like(values)
    header = restore(record, 1, codec, *out)
    assert isinstance(header, Header)
    assert replace(header, segments=()) == header_of(1, codec=codec.levels[0])
    for got, put in zip(out, (keys, values), strict=True):
        assert same_bits(got[1], put[1])
        assert not got[0].any()
        assert not got[2].any()


@settings(max_examples=40)
@given(st.data())
def test_any_shape_comes_back_by_any_copier_in_any_arena(data: st.DataObject) -> None:
    numbers = {"num_layers": 4, "num_heads": 3, "dim": 40, "value_dim": 40, "size": 5}
    shape = {name: data.draw(st.integers(1, most), label=name) for name, most in numbers.items()}
    dtype = data.draw(st.sampled_from(DTYPES))
    keys, values = random_blocks(3, dtype=dtype, seed=data.draw(st.integers(0, 9)), **shape)
    number = data.draw(st.integers(0, 2))
    writer, reader = (copier(data.draw(st.sampled_from(copiers()))) for _ in range(2))
    (record,) = seal_blocks(RAW, 0, [header_of(number)], keys, values, [number])
    assert isinstance(record, RawRecord)
    place = bytearray(record.num_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "copier", lambda *_: writer)
        write_raw([record], [memoryview(place)])
        assert bytes(place) == b"".join(record)  # the pieces and the one pass are the same bytes
        patch.setattr(blocks, "copier", lambda *_: reader)
        out = torch.zeros_like(keys), torch.zeros_like(values)
        assert restore_blocks([memoryview(place)], [key_of(number)], IDENTITY, RAW, 0, *out, [number]) == [None]
    assert same_bits(out[0][number], keys[number])
    assert same_bits(out[1][number], values[number])


def test_raw_pieces_are_views_of_the_tensors() -> None:
    keys, values = random_blocks()
    pieces = [piece for layer in RAW.encode(keys[1], values[1]) for piece in layer]
    keys[1] = 0
    values[1] = 0
    assert not any(any(piece) for piece in pieces)
    assert len(pieces) == 4


def test_a_raw_record_digests_nothing_before_it_is_looked_at() -> None:
    keys, values = random_blocks()
    record = seal_block(RAW, 0, header_of(1), keys[1], values[1])
    keys[1] += 1
    (wanted,) = seal_blocks(RAW, 0, [header_of(1)], keys, values, [1])
    assert b"".join(record) == b"".join(wanted)
    assert len(record) == len(list(record)) == 5  # header, and two pieces a layer
    assert record[0] == read_part(record)
    assert list(record[1:]) == list(record)[1:]


def read_part(record: Sequence[Buffer]) -> bytes:
    return b"".join(record)[: header_bytes(2)]


def test_blocks_of_one_arena_need_not_be_contiguous_over_layers(each: str) -> None:
    keys, values = random_blocks(4, num_layers=6, dtype=torch.float16)
    keys, values = keys[::2, ::3], values[::2, ::3]
    record = sealed(RAW, keys, values, 1)
    wide = torch.zeros(2, 5, 2, 4, 24, dtype=torch.float16), torch.zeros(2, 5, 2, 4, 8, dtype=torch.float16)
    out = wide[0][:, 1:5:2], wide[1][:, 1:5:2]
    assert restore_blocks([memoryview(record)], [key_of(1)], IDENTITY, RAW, 0, *out, [1]) == [None]
    assert same_bits(out[0][1], keys[1])
    assert same_bits(out[1][1], values[1])
    assert not wide[0][:, ::2].any()
    assert not wide[0][0].any()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_blocks_at_once(each: str, num_threads: int) -> None:
    keys, values = random_blocks(40, dim=64)
    order = np.random.default_rng(1).permutation(40).tolist()
    records = seal_blocks(RAW, 0, [header_of(n) for n in order], keys, values, order)
    places = [memoryview(bytearray(record.num_bytes)) for record in records]
    write_raw(records, places, num_threads)
    assert [bytes(place) for place in places] == [sealed(RAW, keys, values, n) for n in order]
    out = torch.zeros_like(keys), torch.zeros_like(values)
    names = [key_of(n) for n in order]
    assert restore_blocks(places, names, IDENTITY, RAW, 0, *out, order, num_threads) == [None] * 40
    assert same_bits(out[0], keys)
    assert same_bits(out[1], values)


def test_records_of_several_arenas_in_one_write(each: str) -> None:
    small, large = random_blocks(), random_blocks(num_layers=4, dtype=torch.float32)
    records = [seal_block(RAW, 0, header_of(1), k[1], v[1]) for k, v in (small, large, small)]
    places = [memoryview(bytearray(record.num_bytes)) for record in records]
    write_raw(records, places)
    assert [bytes(place) for place in places] == [sealed(RAW, *arena, 1) for arena in (small, large, small)]


# faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
def test_a_flipped_bit_in_any_byte_is_a_fault(each: str, codec: Codec) -> None:
    keys, values = random_blocks(num_heads=1, dim=5, value_dim=2)  # segments with paddings
    record = bytearray(sealed(codec, keys, values, 1))
    out = torch.zeros_like(keys), torch.zeros_like(values)
    for position in range(len(record)):
        bit = 1 << position % 8
        record[position] ^= bit
        assert isinstance(restore(record, 1, codec, *out), Fault), f"byte {position}"
        (fault,) = restore_blocks([memoryview(record)], [key_of(1)], IDENTITY, codec, 0, *out, [1])
        assert fault is not None
        record[position] ^= bit
    assert isinstance(restore(record, 1, codec, *out), Header)


def test_a_bit_of_each_of_a_thousand_records_is_found_by_every_copier(each: str) -> None:
    keys, values = random_blocks(100, dim=64, value_dim=64)
    rng = np.random.default_rng(0)
    records = [bytearray(sealed(RAW, keys, values, n)) for n in range(100)]
    out = torch.zeros_like(keys), torch.zeros_like(values)
    names, numbers = [key_of(n) for n in range(100)], list(range(100))
    for _ in range(10):
        flipped = [bytearray(record) for record in records]
        for record in flipped:
            record[int(rng.integers(len(record)))] ^= 1 << int(rng.integers(8))
        flipped[50] = records[50]  # one sound among them is not taken along
        faults = restore_blocks([memoryview(r) for r in flipped], names, IDENTITY, RAW, 0, *out, numbers)
        assert [n for n, fault in enumerate(faults) if fault is None] == [50]


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
def test_every_truncation_is_corrupt(each: str, codec: Codec) -> None:
    keys, values = random_blocks(num_heads=1, dim=5, value_dim=2)  # segments with paddings
    record = sealed(codec, keys, values, 1)
    out = torch.zeros_like(keys), torch.zeros_like(values)
    for length in range(len(record)):
        cut_off = memoryview(record)[:length]
        (fault,) = restore_blocks([cut_off], [key_of(1)], IDENTITY, codec, 0, *out, [1])
        assert fault is not None
        assert fault.kind == FaultKind.CORRUPT
        assert fault == restore(cut_off, 1, codec, *out)


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
def test_another_key_identity_codec_or_version_is_foreign(each: str, codec: Codec) -> None:
    keys, values = random_blocks()
    out = torch.zeros_like(keys), torch.zeros_like(values)
    record, older = sealed(codec, keys, values, 1), bytearray(sealed(codec, keys, values, 1))
    older[7] = 2
    other = Backwards() if codec is RAW else RAW
    found = [
        *restore_blocks([memoryview(record)], [key_of(2)], IDENTITY, codec, 0, *out, [1]),
        *restore_blocks([memoryview(record)], [key_of(1)], key_of(1), codec, 0, *out, [1]),
        *restore_blocks([memoryview(record)], [key_of(1)], IDENTITY, other, 0, *out, [1]),
        *restore_blocks([memoryview(older)], [key_of(1)], IDENTITY, codec, 0, *out, [1]),
        restore(record, 1, codec, *out, key=key_of(2)),
    ]
    assert [fault and fault.kind for fault in found] == [FaultKind.FOREIGN] * 5
    assert not out[0].any()  # told before anything is written


def test_faults_of_the_store_are_handed_on(each: str) -> None:
    keys, values = random_blocks()
    out = torch.zeros_like(keys), torch.zeros_like(values)
    missing = Fault(FaultKind.MISSING)
    views = [missing, memoryview(sealed(RAW, keys, values, 1)), missing]
    assert restore_blocks(views, [key_of(n) for n in range(3)], IDENTITY, RAW, 0, *out, [0, 1, 2]) == [
        missing,
        None,
        missing,
    ]
    assert restore_blocks([], [], IDENTITY, RAW, 0, *out, []) == []
    assert same_bits(out[0][1], keys[1])


def test_a_block_of_another_shape_is_corrupt(each: str) -> None:
    record = sealed(RAW, *random_blocks(), 1)
    for changed in ({"num_layers": 3}, {"num_layers": 1}, {"dim": 16}, {"dtype": torch.float32}):
        out = random_blocks(**changed)
        fault = restore(record, 1, RAW, *out)
        assert isinstance(fault, Fault)
        assert fault.kind == FaultKind.CORRUPT
        assert restore_blocks([memoryview(record)], [key_of(1)], IDENTITY, RAW, 0, *out, [1]) == [fault]


def test_what_a_codec_refuses_is_corrupt() -> None:
    keys, values = random_blocks()
    record = b"".join(
        blocks.seal(header_of(1, codec="backwards"), [[b"C", b"x" * 10] for _ in range(2)])  # sound, but nonsense
    )
    fault = restore(record, 1, Backwards(), keys, values)
    assert isinstance(fault, Fault)
    assert fault.kind == FaultKind.CORRUPT
    assert "no B" in fault.detail


def test_wrong_use_is_an_error_and_no_fault() -> None:
    keys, values = random_blocks()
    with pytest.raises(ValueError, match="another codec"):
        seal_block(RAW, 0, header_of(1, codec="int8"), keys[1], values[1])
    for number in (-1, 3):
        with pytest.raises(ValueError, match="of an arena of 3"):
            seal_blocks(RAW, 0, [header_of(1)], keys, values, [number])
    record = sealed(RAW, keys, values, 1)
    for out in ((keys, values[:, :1]), (keys[:, :1], values)):
        with pytest.raises(ValueError, match="last dimension"):
            restore(record, 1, RAW, *out)
        with pytest.raises(ValueError, match="last dimension"):
            restore_blocks([memoryview(record)], [key_of(1)], IDENTITY, RAW, 0, *out, [1])
    with pytest.raises(ValueError, match="one run of CPU memory"):
        seal_block(RAW, 0, header_of(1), keys[1].transpose(1, 2), values[1].transpose(1, 2))


# layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
def test_layers_come_back_one_by_one(each: str, codec: Codec) -> None:
    keys, values = random_blocks(num_layers=3)
    record = sealed(codec, keys, values, 1)
    header = read_header(record[: header_bytes(3)])
    assert isinstance(header, Header)
    out = torch.zeros_like(keys[1]), torch.zeros_like(values[1])
    for layer in (2, 0, 1):
        extent = layer_extent(header, layer)
        assert extent.key == key_of(1)
        segment = bytearray(record[extent.start : extent.stop])
        assert restore_layer(segment, header, layer, codec, 0, out[0][layer], out[1][layer]) is None
        assert same_bits(out[0][layer], keys[1, layer])
        assert same_bits(out[1][layer], values[1, layer])
        segment[3] ^= 4
        for wrong in (segment, segment[:-1], b"", record[64:164]):
            fault = restore_layer(wrong, header, layer, codec, 0, out[0][layer], out[1][layer])
            assert isinstance(fault, Fault)
            assert fault.kind == FaultKind.CORRUPT


def test_a_layer_of_another_is_corrupt(each: str) -> None:
    keys, values = random_blocks()
    record = sealed(RAW, keys, values, 1)
    opened = open_record(record, key_of(1), IDENTITY, "raw")
    assert not isinstance(opened, Fault)
    header, segments = opened
    assert restore_layer(segments[1], header, 0, RAW, 0, keys[0, 0], values[0, 0]) is not None


# memory that changes while it is read -----------------------------------------------------------------------


@pytest.mark.parametrize("codec", [RAW, Backwards()], ids=["raw", "backwards"])
def test_memory_reused_while_it_is_read_gives_the_block_or_a_fault(each: str, codec: Codec) -> None:
    """Another thread writes other sound records into the memory that a record is restored from."""
    keys, values = random_blocks(4, num_heads=4, size=16, dim=64, value_dim=64)
    records = [sealed(codec, keys, values, n) for n in range(4)]
    place = np.frombuffer(bytearray(records[1]), np.uint8)
    source = [np.frombuffer(record, np.uint8) for record in records]
    done = threading.Event()

    def reuse() -> None:
        rng = np.random.default_rng(0)
        while not done.is_set():
            np.copyto(place, source[int(rng.integers(4))])

    thread = threading.Thread(target=reuse)
    thread.start()
    out = torch.zeros_like(keys), torch.zeros_like(values)
    try:
        for _ in range(150):
            (fault,) = restore_blocks([memoryview(place)], [key_of(1)], IDENTITY, codec, 0, *out, [1])
            if fault is None:
                assert same_bits(out[0][1], keys[1])
                assert same_bits(out[1][1], values[1])
    finally:
        done.set()
        thread.join()


def test_a_codec_decodes_a_copy_that_was_checked(each: str) -> None:
    keys, values = random_blocks()
    place = bytearray(sealed(Backwards(), keys, values, 1))

    class Interrupted(Backwards):
        def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
            if layer == 1:
                place[:] = bytes(len(place))  # the memory is used again just now
            super().decode(segment, layer, keys, values, level)

    out = torch.zeros_like(keys), torch.zeros_like(values)
    assert isinstance(restore(place, 1, Interrupted(), *out), Header)
    assert same_bits(out[0][1], keys[1])
    assert same_bits(out[1][1], values[1])


def test_shape_tells_the_bytes_of_a_record() -> None:
    keys, values = random_blocks()
    assert Shape(2, 384, 128, 384, 128).record_bytes == len(sealed(RAW, keys, values, 1))


def test_copiers_share_one_interface() -> None:
    def takes(one: Copier) -> str:
        return one.name

    assert [takes(copier(name)) for name in copiers()] == copiers()
