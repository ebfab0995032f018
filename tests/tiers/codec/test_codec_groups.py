"""int8 and int4: the numbers of a plain oracle, half a step at most, and groups that no value can spoil."""

import struct
from typing import Any

import numpy as np
import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.tiers.codec.int4 import Int4
from kvwise.tiers.codec.int8 import Int8
from tests.tiers.codec.codec_samples import back, blocks, round_trip, segments

SHAPES = [(2, 2, 16, 32), (1, 3, 8, 20), (1, 1, 24, 7), (2, 5, 48, 40), (1, 3, 64, 64), (1, 1, 5, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = pytest.mark.parametrize("codec", [Int8(), Int4(), Int8(group=10), Int4(group=10), Int4(group=1)], ids=str)


def oracle(codec: Any, segment: bytes, heads: int, size: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keys, values [H, block_size, D], steps of both) that a segment says, read number by number."""
    bits = 8 if codec.name == "int8" else 4
    group_k, group_v = min(codec.group, size), min(codec.group, dim)
    key_groups, value_groups = heads * -(-size // group_k) * dim, heads * size * -(-dim // group_v)
    groups, count = key_groups + value_groups, heads * size * dim
    power_k, power_v, _, _ = struct.unpack_from("<bbBB", segment)
    scales = struct.unpack_from(f"<{groups}e", segment, 4)
    zeros = struct.unpack_from(f"<{groups}e", segment, 4 + 2 * groups)
    codes = segment[4 + 4 * groups :]
    assert len(codes) == count * bits // 4
    found, steps = np.zeros((2, heads, size, dim)), np.zeros((2, heads, size, dim))
    for i, (h, t, d) in enumerate(np.ndindex(heads, size, dim)):
        key_at = (h * -(-size // group_k) + t // group_k) * dim + d
        value_at = key_groups + (h * size + t) * -(-dim // group_v) + d // group_v
        key_code, value_code = (codes[i], codes[count + i]) if bits == 8 else (codes[i] & 15, codes[i] >> 4)
        for part, (at, code, power) in enumerate(((key_at, key_code, power_k), (value_at, value_code, power_v))):
            steps[part, h, t, d] = scales[at] * 2.0**power
            found[part, h, t, d] = (zeros[at] + code * scales[at]) * 2.0**power
    return found[0], found[1], steps


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_comes_back_is_what_the_segment_says_and_half_a_step_away(codec: Any, shape: tuple[int, ...]) -> None:
    keys, values = (tensor[0] for tensor in blocks(1, shape))
    parts = segments(codec, keys, values)
    assert len(parts) == shape[0]
    restored = back(codec, parts, keys)
    for layer, part in enumerate(parts):
        *said, steps = oracle(codec, part, *shape[1:])
        for half, (tensor, wanted) in enumerate(zip(restored, (keys, values), strict=True)):
            assert np.allclose(tensor[layer].numpy(), said[half], rtol=1e-6, atol=1e-6)
            assert (np.abs(said[half] - wanted[layer].double().numpy()) <= 0.5001 * steps[half] + 1e-9).all()


@BOTH
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_steps_are_as_small_as_the_spread_of_a_group_allows(codec: Any, shape: tuple[int, ...]) -> None:
    """The layout is KIVI's: a group of keys is tokens of a channel, one of values channels of a token."""
    keys, values = (tensor[0] for tensor in blocks(1, shape))
    _, heads, size, dim = shape
    top = 255 if codec.name == "int8" else 15
    steps = oracle(codec, segments(codec, keys, values)[0], *shape[1:])[2]
    for h in range(heads):
        for start in range(0, size, codec.group):
            spread = keys[0, h, start : start + codec.group].double().numpy()
            room = (np.ptp(spread, axis=0) + np.abs(spread).max(0) * 2**-9) / top
            assert (steps[0, h, start] <= room * 1.01 + 1e-6).all()
        for start in range(0, dim, codec.group):
            spread = values[0, h, :, start : start + codec.group].double().numpy()
            room = (np.ptp(spread, axis=1) + np.abs(spread).max(1) * 2**-9) / top
            assert (steps[1, h, :, start] <= room * 1.01 + 1e-6).all()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_groups_and_outliers_are_safe(codec: Any, dtype: torch.dtype) -> None:
    keys, values = (tensor[0] for tensor in blocks(1, (1, 2, 16, 32), dtype))
    keys[0, 0, :, 0] = 3.25  # exact in float16: comes back exactly
    keys[0, 0, :, 1] = 1000.1
    values[0, 1, 2] = 0
    values[0, 0, 0, 0] = torch.finfo(dtype).max / 2**10
    keys[0, 1, 5, 5] = -60000
    found = round_trip(codec, keys, values)
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found[0][0, 0, :, 0] == 3.25).all()
    assert (found[1][0, 1, 2] == 0).all()
    near = found[0][0, 0, :, 1].float()
    assert torch.allclose(near, keys[0, 0, :, 1].float(), rtol=2e-3)
    assert float(found[0][0, 1, 5, 5]) == pytest.approx(-60000, rel=0.04)
    apart = torch.ones(16, 32, dtype=torch.bool)
    apart[:, 5] = False  # an outlier costs its own channel only
    gap = (found[0][0, 1] - keys[0, 1]).abs().float()
    assert float(gap[apart].max()) <= 1.5


@BOTH
def test_the_largest_float16_comes_back_finite(codec: Any) -> None:
    keys = torch.zeros(1, 1, 16, 32, dtype=torch.float16)
    keys[..., 1] = keys[..., 2, :] = torch.finfo(torch.float16).max
    for tensor in (*round_trip(codec, keys, keys), *round_trip(codec, -keys, -keys)):
        assert tensor.isfinite().all()
        assert tensor.abs().max() == torch.finfo(torch.float16).max


@BOTH
def test_scale_does_not_matter(codec: Any) -> None:
    """Numbers a power of two larger or smaller take the same codes: no range is worse than another."""
    keys, values = (tensor[0] for tensor in blocks(1, (1, 2, 16, 32)))
    plain = segments(codec, keys, values)[0]
    for exponent in (-60, -20, 20, 60, 100):
        other = segments(codec, keys * 2.0**exponent, values * 2.0**exponent)[0]
        assert other[4:] == plain[4:]
        assert other[:2] == bytes((plain[i] + exponent) % 256 for i in range(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**120])
@BOTH
def test_what_is_no_number_is_refused(codec: Any, bad: float) -> None:
    keys, values = (tensor[0] for tensor in blocks(1))
    for spoilt in (keys, values):
        kept = spoilt[2, 1, 3, 4].item()
        spoilt[2, 1, 3, 4] = bad
        with pytest.raises(ValueError, match="cannot be quantised"):
            codec.encode(keys, values)
        spoilt[2, 1, 3, 4] = kept
    codec.encode(keys, values)


@BOTH
@pytest.mark.parametrize("half", [0x7C00, 0x7E00, 0xBC00, 0xFC00], ids=["inf", "nan", "negative", "-inf"])
def test_scales_that_no_encoder_writes_are_refused(codec: Any, half: int) -> None:
    keys, values = (tensor[0] for tensor in blocks(1, (1, 2, 16, 32)))
    part = bytearray(segments(codec, keys, values)[0])
    part[4:6] = struct.pack("<H", half)
    with pytest.raises(ValueError, match="a scale is negative or no number"):
        back(codec, [bytes(part)], keys)
    part[4:6] = struct.pack("<e", 60000)
    with pytest.raises(ValueError, match="a group reaches beyond"):
        back(codec, [bytes(part)], keys)
    for power in (107, -101):
        with pytest.raises(ValueError, match="no layer is scaled"):
            back(codec, [struct.pack("<b", power) + bytes(part[1:])], keys)


def test_sizes() -> None:
    """A block of 16 tokens: 2 bits a key and 1 a value for scales and zeros."""
    keys, values = (tensor[0] for tensor in blocks(1, (1, 8, 16, 128)))
    count = keys.numel() + values.numel()
    assert [len(segments(codec, keys, values)[0]) * 8 / count for codec in (Int8(), Int4())] == [
        8 + 1.5 + 32 / count,
        4 + 1.5 + 32 / count,
    ]


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_group_is_named_by_the_spec_and_checked(kind: Any) -> None:
    assert kind(group=8).levels == (f"{kind.name}(group=8)",)
    with pytest.raises(UsageError, match=f"{kind.name}: group=0 must be at least 1"):
        kind(group=0)
