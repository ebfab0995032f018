"""rANS: the native coder and numpy's write the same bytes, and neither believes a stream."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.tiers.codec import rans

CODERS = {"native": (rans.encode, rans.decode), "numpy": (rans.encode_reference, rans.decode_reference)}
ANY_CODER = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)
SHAPES = [((400, 400), 1, 16), ((16, 16, 2, 2), 24, 31), ((7, 0, 3), 5, 63), ((1,), 1, 2), ((0,), 3, 4), ((1, 1), 1, 1)]
LARGE = ((16384, 16384), 1, 16)


def drawn(rows: tuple[int, ...], columns: int, num_codes: int, seed: int = 0) -> tuple[np.ndarray, rans.Tables]:
    """Codes that follow their distributions, column by column: an order of their own, not the module's."""
    rng = np.random.default_rng(seed)
    weights = rng.random((len(rows) * columns, num_codes)) ** 4
    tables = rans.Tables(rans.ends_of(weights, rans.width_for(num_codes)), rows, columns)
    slots = np.diff(tables.ends.astype(int), axis=1, prepend=0) / rans.TOTAL
    parts = []
    for part, count in enumerate(rows):
        cells = [rng.choice(slots.shape[1], count, p=slots[part * columns + c]) for c in range(columns)]
        parts.append(np.stack(cells, 1).astype(np.uint8).reshape(-1))
    return np.concatenate(parts), tables


@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_native_and_numpy_write_the_same_bytes_and_read_each_other(shape: tuple[tuple[int, ...], int, int]) -> None:
    codes, tables = drawn(*shape)
    stream = rans.encode(codes, tables)
    assert stream == rans.encode_reference(codes, tables)
    assert np.array_equal(rans.decode(stream, tables), codes)
    assert np.array_equal(rans.decode_reference(stream, tables), codes)


def test_the_native_coder_is_what_runs() -> None:
    pytest.importorskip("kvwise._native", reason="kvwise was installed without its native kernels")
    assert rans._is_native()


@pytest.mark.parametrize("shape", [LARGE, ((14, 14, 2, 2) * 8, 128, 31)], ids=str)
def test_a_stream_is_as_long_as_its_codes_are_unlikely(shape: tuple[tuple[int, ...], int, int]) -> None:
    codes, tables = drawn(*shape)
    slots = np.diff(tables.ends.astype(int), axis=1, prepend=0)
    bits, base = 0.0, 0
    for part, count in enumerate(tables.rows):
        cells = codes[base : base + count * tables.columns].reshape(count, tables.columns)
        own = slots[part * tables.columns + np.arange(tables.columns), cells]
        bits, base = bits + float((rans.BITS - np.log2(own)).sum()), base + cells.size
    assert 0 <= 8 * len(rans.encode(codes, tables)) - bits <= 32 * tables.lanes + 16 + 0.001 * codes.size


def test_cost_is_the_sum_over_counts() -> None:
    codes, tables = drawn(*LARGE)
    counts = np.stack([np.bincount(part, minlength=16) for part in codes.reshape(2, -1)])
    expected = 8 * len(rans.encode(codes, tables))
    assert rans.cost_bits(counts, tables.ends) == pytest.approx(expected, rel=0.01)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=64))
def test_every_code_has_a_slot_whatever_was_seen(weights: list[float]) -> None:
    width = rans.width_for(len(weights))
    ends = rans.ends_of(np.array([weights]), width)
    rans.check_ends(ends)
    slots = np.diff(ends[0].astype(int), prepend=0)
    assert (slots[: len(weights)] >= 1).all()
    assert slots.sum() == rans.TOTAL
    if sum(weights) > 0:
        share = np.array(weights) / sum(weights)
        assert np.abs(slots[: len(weights)] / rans.TOTAL - share).max() <= 2 * len(weights) / rans.TOTAL


@ANY_CODER
def test_a_code_without_slots_is_refused(coder: tuple) -> None:
    tables = rans.Tables(rans.ends_of(np.ones((1, 3)), 16), (4,), 1)
    for bad in (3, 15, 16, 255):
        with pytest.raises(ValueError, match="has no slots"):
            coder[0](np.array([0, 1, bad, 2], np.uint8), tables)


@ANY_CODER
def test_every_truncation_is_refused(coder: tuple) -> None:
    codes, tables = drawn((40, 40), 1, 16)
    stream = rans.encode(codes, tables)
    for cut in (*range(len(stream)), -2):
        with pytest.raises(ValueError, match="are no stream"):
            coder[1](stream[:cut], tables)
    with pytest.raises(ValueError, match="are no stream"):
        coder[1](stream + b"\x00\x00", tables)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(SHAPES[:4]))
def test_random_bytes_decode_alike_or_not_at_all(data: bytes, shape: tuple[tuple[int, ...], int, int]) -> None:
    """Any bytes: both coders agree, and what they accept is exactly what encoding gives back."""
    tables = drawn(*shape)[1]
    found = []
    for _, decode in CODERS.values():
        try:
            found.append(decode(data, tables))
        except ValueError:
            found.append(None)
    if found[0] is None or found[1] is None:
        assert found[0] is found[1]
    else:
        assert np.array_equal(found[0], found[1])
        assert rans.encode(found[0], tables) == data


def test_a_changed_bit_is_refused_or_gives_other_codes() -> None:
    codes, tables = drawn((60, 60), 1, 16)
    stream = rans.encode(codes, tables)
    for bit in range(8 * len(stream)):
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert not np.array_equal(rans.decode(changed, tables), codes)
        except ValueError:
            continue


def test_broken_tables_are_refused() -> None:
    sound = rans.ends_of(np.ones((2, 3)), 16)
    rans.check_ends(sound)
    falling, short, empty = sound.copy(), sound.copy(), sound.copy()
    falling[0, 1], short[1, -1], empty[0, 0] = 0, rans.TOTAL - 1, 0
    for bad in (falling, short, empty, sound.astype(np.int32), sound[:, :15]):
        with pytest.raises(ValueError, match="no table of distributions"):
            rans.check_ends(bad)
    codes = np.zeros(4, np.uint8)
    for bad in (rans.Tables(sound, (4,), 1), rans.Tables(sound, (1, 2), 1), rans.Tables(sound[:, :8], (2, 2), 1)):
        with pytest.raises(ValueError, match=r"ends for|the tables are for|StopIteration"):
            rans.encode(codes, bad)
