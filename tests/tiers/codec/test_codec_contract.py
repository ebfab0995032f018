"""What every codec of the folder promises, and where the catalogue finds it."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.tiers.codec.cachegen import CacheGenCodec
from kvwise.tiers.codec.catalogue import codecs, is_lossless, make_codec
from kvwise.tiers.codec.int4 import Int4
from kvwise.tiers.codec.int4z import ZSTD, Int4z, Int4zOptions
from tests.tiers.codec.codec_samples import SHAPE, back, blocks, lossy, round_trip, segments

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=32)
SPECS = ["raw", "int8", "int8(group=16)", "int4(group=64)", "int4z", "cachegen", "cachegen(levels=2, mode=released)"]
SHAPES = [(3, 2, 16, 32), (2, 3, 8, 20), (1, 5, 64, 16), (2, 1, 32, 7), (1, 7, 24, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY_SPEC = pytest.mark.parametrize("spec", SPECS)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return blocks(4, seed=7)


def made(spec: str) -> Any:
    return make_codec(spec, layout=LAYOUT, sample=sample)


@ANY_SPEC
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trips_lossless_or_nearly(spec: str, dtype: torch.dtype) -> None:
    codec = made(spec)
    keys, values = (tensor[0].to(dtype) for tensor in blocks(1))
    for level in range(len(codec.levels)):
        for found, wanted in zip(round_trip(codec, keys, values, level), (keys, values), strict=True):
            assert found.dtype is dtype
            error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
            assert error == 0 if codec.lossless else 0 < error < 0.25


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_block_size_and_number_of_heads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    keys, values = (tensor[0].to(dtype) for tensor in blocks(1, shape))
    for codec in lossy(shape):
        parts = segments(codec, keys, values)
        assert len(parts) == shape[0]
        for found, wanted in zip(back(codec, parts, keys), (keys, values), strict=True):
            assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 0.25


@ANY_SPEC
def test_the_same_block_is_the_same_bytes_from_any_thread(spec: str) -> None:
    codec = made(spec)
    keys, values = blocks(6)
    once = [segments(codec, k, v) for k, v in zip(keys, values, strict=True)]
    numbers = [back(codec, parts, keys[0]) for parts in once]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda i: segments(codec, keys[i], values[i]), range(6))) == once
            for found, wanted in zip(pool.map(lambda i: back(codec, once[i], keys[0]), range(6)), numbers, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    again = made(spec)
    assert again.levels == codec.levels
    assert [segments(again, k, v) for k, v in zip(keys, values, strict=True)] == once


@ANY_SPEC
def test_layers_read_alone_and_other_tensors_stay(spec: str) -> None:
    """Layers come in any order; views into an arena are enough."""
    codec = made(spec)
    keys, values = (tensor[0] for tensor in blocks(1))
    parts, arena = segments(codec, keys, values), torch.full((9, 2, *SHAPE[1:]), 7.0)
    for layer in (2, 0, 1):
        codec.decode(memoryview(bytearray(parts[layer])), layer, arena[3 * layer, 0], arena[3 * layer, 1])
    whole = back(codec, parts, keys)
    assert torch.equal(arena[::3, 0], whole[0])
    assert torch.equal(arena[::3, 1], whole[1])
    arena[::3] = 7
    assert (arena == 7).all()
    strided = torch.zeros(6, *SHAPE[1:])
    strided[::2] = keys
    assert segments(codec, strided[::2], values) == parts


@ANY_SPEC
def test_a_segment_cut_anywhere_is_refused(spec: str) -> None:
    codec = made(spec)
    keys, values = (tensor[0] for tensor in blocks(1))
    for level in range(len(codec.levels)):
        part = segments(codec, keys, values, level)[1]
        for cut in {*range(0, len(part), 61), *range(12), len(part) - 2, len(part) - 1}:
            with pytest.raises(ValueError):  # noqa: PT011 - each codec says it in its own words
                codec.decode(part[:cut], 1, keys[1].clone(), values[1].clone(), level)
        for more in (b"\x00", b"\x00\x00", part):
            with pytest.raises(ValueError):  # noqa: PT011
                codec.decode(part + more, 1, keys[1].clone(), values[1].clone(), level)


@cache
def targets() -> list[tuple[Any, int, bytes]]:
    """Each lossy codec at each level, with a segment it wrote."""
    keys, values = (tensor[0] for tensor in blocks(1))
    found = [(c, level, segments(c, keys, values, level)[0]) for c in lossy() for level in range(len(c.levels))]
    wide = Int4z(Int4zOptions(group=SHAPE[3]))  # its zstd form, which blocks of this size are too small for
    kept = segments(wide, keys, values)[0]
    start = len(segments(Int4(), keys, values)[0]) - keys[0].numel()
    zipped = pyarrow.Codec("zstd").compress(kept[start : start + keys[0].numel()].ljust(keys[0].numel()), asbytes=True)
    return [*found, (wide, 0, kept[:2] + bytes([ZSTD]) + kept[3:start] + zipped)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_hostile_segments_raise_value_error_only(data: st.DataObject) -> None:
    """Random bytes, and sound segments with a few bytes changed: ValueError, or finite numbers of the right shape."""
    codec, level, sound = data.draw(st.sampled_from(targets()))
    part = bytearray(sound)
    if data.draw(st.booleans()):
        part = bytearray(data.draw(st.binary(max_size=400)))
    for _ in range(data.draw(st.integers(0, 6))):
        if part:
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    keys, values = torch.zeros(SHAPE[1:]), torch.zeros(SHAPE[1:])
    try:
        codec.decode(bytes(part), 0, keys, values, level)
    except ValueError:
        return
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_specs_are_distinct_short_and_ascii() -> None:
    specs = [spec for text in (*SPECS, "int4", "int4z(group=8)", "cachegen(levels=1)") for spec in made(text).levels]
    assert len(set(specs)) == len(specs)
    assert all(spec.isascii() and len(spec) <= 64 for spec in specs)
    assert made("int4").levels == made("int4(group=32)").levels


def test_the_folder_is_the_catalogue() -> None:
    found = codecs()
    assert set(found) == {"raw", "int8", "int4", "int4z", "cachegen"}
    assert all(kind.name == name for name, kind in found.items())
    assert [name for name in found if found[name].lossless] == ["raw"]
    assert is_lossless("raw")
    assert not is_lossless("int4(group=8)")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gzip", "unknown codec 'gzip': choose one of cachegen, int4, int4z, int8, raw"),
        ("quantise", "unknown codec 'quantise'"),
        ("raw(group=3)", "raw has no option 'group'; its options: none"),
        ("int4(groups=3)", "int4 has no option 'groups'; its options: group"),
        ("int4(group=a)", "int4: group='a' must be a whole number"),
        ("int8(group=-1)", "int8: group=-1 must be at least 1"),
        ("cachegen(levels=9)", "cachegen: levels=9 must be 1 to 4"),
        ("cachegen(level=1)", "cachegen has no option 'level'; its options: levels, mode"),
        ("int4)", "is no codec; write name or name"),
    ],
)
def test_what_cannot_be_made_is_named(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(spec)
    assert says in str(caught.value)


def test_samples_are_asked_for_by_those_that_need_them() -> None:
    asked = []

    def count() -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(1)
        return sample()

    for spec in ("raw", "int8", "int4"):
        make_codec(spec, layout=LAYOUT, sample=count)
    assert not asked
    for spec in ("int4z", "cachegen"):
        make_codec(spec, layout=LAYOUT, sample=count)
    assert len(asked) == 2
    with pytest.raises(UsageError, match="cachegen needs sample blocks"):
        make_codec("cachegen", layout=LAYOUT)
    with pytest.raises(UsageError, match="are not \\[n, 3, 2, 8, 32\\]"):
        make_codec("int4z", layout=KVLayout(3, 2, 32, 8), sample=sample)


def test_tables_take_the_samples_place() -> None:
    for spec, kind in (("int4z", Int4z), ("cachegen", CacheGenCodec)):
        codec = made(spec)
        assert isinstance(codec, kind)
        assert make_codec(spec, layout=LAYOUT, tables=codec.tables()).levels == codec.levels
