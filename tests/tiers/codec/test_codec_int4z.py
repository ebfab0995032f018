"""int4z: int4's numbers from fewer bytes, within 0.05 bit of the entropy of the codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.tiers.codec.int4 import Int4
from kvwise.tiers.codec.int4z import OWN, PACKED, SHARED, ZSTD, Int4z, Int4zOptions
from tests.tiers.codec.codec_samples import back, blocks, round_trip, segments

WIDE, SMALL = (2, 8, 16, 128), (4, 2, 16, 32)  # 8 KV heads x 128; the built-in model


def gauss(num: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num, *shape), generator=generator), torch.randn((num, *shape), generator=generator)


def forms(parts: list[bytes]) -> set[int]:
    return {part[2] for part in parts}


def codes_of(keys: Tensor, values: Tensor) -> np.ndarray:
    """Codes [L, K and V, n] of a block, from what int4 wrote."""
    heads, size, dim = keys.shape[1:]
    start = 4 + 4 * (heads * -(-size // 32) * dim + heads * size * -(-dim // 32))
    packed = np.stack([np.frombuffer(part, np.uint8)[start:] for part in segments(Int4(), keys, values)])
    return np.stack((packed & 15, packed >> 4), 1)


def entropy(codes: np.ndarray) -> float:
    share = np.bincount(codes.reshape(-1), minlength=16) / codes.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def bits_above_entropy(codec: Int4z, keys: Tensor, values: Tensor) -> float:
    """Bits a code that a block's segments take above the entropy of each segment's own codes, scales not counted."""
    codes = codes_of(keys, values)
    packed = sum(map(len, segments(Int4(), keys, values))) - codes.size // 2  # heads and scales
    bits = 8 * (sum(map(len, segments(codec, keys, values))) - packed) / codes.size
    return bits - float(np.mean([entropy(part) for layer in codes for part in layer]))


@pytest.mark.parametrize("shape", [WIDE, SMALL, (1, 1, 8, 4), (1, 3, 24, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_gives_back_what_int4_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sample = gauss(4, shape, seed=5)
    keys, values = (tensor[0].to(dtype) for tensor in gauss(1, shape))
    for codec in (Int4z(), Int4z.profile(*sample), Int4z(Int4zOptions(group=8))):
        plain = round_trip(Int4(group=codec._options.group), keys, values)
        assert all(torch.equal(a, b) for a, b in zip(round_trip(codec, keys, values), plain, strict=True))


def test_a_wide_layer_is_near_its_entropy_with_and_without_a_sample() -> None:
    sample = gauss(4, WIDE, seed=5)
    keys, values = (tensor[0] for tensor in gauss(1, WIDE))
    assert forms(segments(Int4z(), keys, values)) == {ZSTD}
    assert 0 < bits_above_entropy(Int4z(), keys, values) <= 0.05
    assert 0 < bits_above_entropy(Int4z.profile(*sample), keys, values) <= 0.05


def test_a_small_layer_needs_a_sample() -> None:
    codec = Int4z.profile(*gauss(16, SMALL, seed=5))
    keys, values = gauss(8, SMALL)
    above = [bits_above_entropy(codec, k, v) for k, v in zip(keys, values, strict=True)]
    assert forms(segments(codec, keys[0], values[0])) == {SHARED}
    assert np.mean(above) <= 0.05
    assert np.mean([bits_above_entropy(Int4z(), k, v) for k, v in zip(keys, values, strict=True)]) > 0.05


def test_each_form_is_taken_where_it_suits_and_reads_back() -> None:
    cases = {
        PACKED: (Int4z(), gauss(1, (4, 1, 8, 32))),
        ZSTD: (Int4z(), gauss(1, WIDE)),
        OWN: (Int4z(), gauss(1, (2, 2, 16, 64))),
        SHARED: (Int4z.profile(*gauss(16, SMALL, seed=5)), gauss(1, SMALL)),
    }
    for form, (codec, (keys, values)) in cases.items():
        parts = segments(codec, keys[0], values[0])
        assert forms(parts) == {form}
        plain = round_trip(Int4(), keys[0], values[0])
        assert all(torch.equal(a, b) for a, b in zip(back(codec, parts, keys[0]), plain, strict=True))
        assert sum(map(len, parts)) <= sum(map(len, segments(Int4(), keys[0], values[0])))


def test_tables_go_into_the_spec_and_come_back() -> None:
    codec = Int4z.profile(*gauss(4, SMALL))
    other = Int4z.profile(*gauss(4, SMALL, seed=1))
    assert len({*Int4z().levels, *codec.levels, *other.levels, *Int4z(Int4zOptions(group=16)).levels}) == 4
    assert codec.levels == Int4z.profile(*gauss(4, SMALL)).levels
    data = codec.tables()
    assert data is not None
    again = Int4z.from_tables(data)
    assert again.levels == codec.levels
    keys, values = (tensor[0] for tensor in gauss(1, SMALL, seed=3))
    assert segments(again, keys, values) == segments(codec, keys, values)
    assert Int4z().tables() is None
    with pytest.raises(ValueError, match=r"tables of int4z\(group=32\), wanted int4z\(group=16\)"):
        Int4z.from_tables(data, Int4zOptions(group=16))


def test_tables_are_of_one_model() -> None:
    codec = Int4z.profile(*gauss(4, SMALL))
    keys, values = (tensor[0] for tensor in gauss(1, (3, *SMALL[1:])))
    with pytest.raises(ValueError, match="a block of 3 layers, but the tables are for 4"):
        codec.encode(keys, values)
    wide = (tensor[0] for tensor in gauss(1, (5, *SMALL[1:])))
    part = segments(Int4z.profile(*gauss(4, (5, *SMALL[1:]))), *wide)[0]
    for reader in (Int4z(), codec):
        with pytest.raises(ValueError, match="none for its layer"):
            reader.decode(part[:2] + bytes([SHARED]) + part[3:], 4, keys[0], values[0])


def test_a_zstd_bomb_takes_no_more_than_the_layer() -> None:
    import pyarrow

    keys, values = (tensor[0] for tensor in gauss(1, WIDE))
    part = segments(Int4z(), keys, values)[0]
    start = len(segments(Int4(), keys, values)[0]) - keys[0].numel()
    for size in (10**8, keys[0].numel() + 1, keys[0].numel() - 1, 0):
        bomb = pyarrow.Codec("zstd").compress(bytes(size), asbytes=True)
        with pytest.raises(ValueError, match="zstd frame"):
            Int4z().decode(part[:start] + bomb, 0, keys[0], values[0])


def test_group_is_checked() -> None:
    with pytest.raises(UsageError, match="int4z: group=0 must be at least 1"):
        Int4zOptions(group=0)


def test_a_small_layer_of_another_shape_of_numbers_too() -> None:
    """Codes that are not normal: keys of one channel run on from token to token."""
    keys, values = blocks(24, SMALL)
    codec = Int4z.profile(keys[:16], values[:16])
    assert np.mean([bits_above_entropy(codec, k, v) for k, v in zip(keys[16:], values[16:], strict=True)]) <= 0.05
