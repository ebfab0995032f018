"""CacheGen: both modes against an oracle written token by token, error bounds, and what its tables are tied to."""

import numpy as np
import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.tiers.codec.cachegen import CacheGenCodec, CacheGenOptions
from kvwise.tiers.codec.cachegen_codes import MODES
from kvwise.tiers.codec.rans import ends_of
from tests.tiers.codec.codec_samples import SHAPE, back, blocks, round_trip, segments

PAPER_BINS = {0: (64, 48, 32), 1: (32, 24, 16), 2: (16, 12, 8), 3: (12, 8, 6)}
RELEASED_BINS = {0: (32, 16), 1: (24, 12), 2: (16, 8), 3: (12, 6)}
LEVELS = range(4)
SHAPES = [SHAPE, (4, 1, 8, 16), (1, 3, 24, 7), (32, 1, 10, 4), (6, 2, 64, 8), (2, 1, 1, 5)]


def profiled(mode: str, shape: tuple[int, ...] = SHAPE, levels: int = 4) -> CacheGenCodec:
    return CacheGenCodec.profile(*blocks(4, shape, seed=7), CacheGenOptions(levels=levels, mode=mode))


def released_steps(part: str, level: int, layer: int, num_layers: int) -> int:
    early, late = RELEASED_BINS[level]
    cut = {"keys": num_layers * 10 / 32, "values": 2}[part]
    return (early if layer < round(cut) else late) // 2 - 1


def code_tokens(rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes back as numbers, half a step) of tokens [tokens, channels]: round(x * m / max + m), released code's words.

    The largest magnitude is rounded up to eleven significant bits, as float16 does.
    """
    numbers, halves = np.zeros_like(rows), np.zeros(len(rows))
    for token, row in enumerate(rows):
        largest = np.abs(row).max()
        if not largest:
            continue
        unit = 2.0 ** (np.floor(np.log2(largest)) - 10)
        largest = np.ceil(largest / unit) * unit
        codes = np.round(row * steps / largest + steps)
        numbers[token], halves[token] = (codes - steps) * largest / steps, largest / steps / 2
    return numbers, halves


def oracle(tensor: torch.Tensor, mode: str, part: str, level: int, layer: int, num_layers: int) -> tuple:
    """(numbers [tokens, channels] that must come back of [H, block_size, D], half a step of each token)."""
    rows = tensor.double().permute(1, 0, 2).reshape(tensor.shape[1], -1).numpy()
    if mode == "released":
        return code_tokens(rows, released_steps(part, level, layer, num_layers))
    bins = PAPER_BINS[level][layer * 3 // num_layers]
    numbers, halves = np.zeros_like(rows), np.zeros(len(rows))
    for start in range(0, len(rows), 10):
        group = rows[start : start + 10]
        numbers[start : start + 1], halves[start : start + 1] = code_tokens(group[:1], 127)
        found, halves[start + 1 : start + 10] = code_tokens(group[1:] - numbers[start], bins // 2 - 1)
        numbers[start + 1 : start + 10] = found + numbers[start]
    return numbers, halves


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_what_comes_back_is_the_oracles_and_half_a_step_away(mode: str, level: int, shape: tuple[int, ...]) -> None:
    keys, values = (tensor[0] for tensor in blocks(1, shape))
    found = round_trip(profiled(mode, shape), keys, values, level)
    for part, restored, wanted in zip(("keys", "values"), found, (keys, values), strict=True):
        for layer in range(shape[0]):
            said, halves = oracle(wanted[layer], mode, part, level, layer, shape[0])
            rows = restored[layer].double().permute(1, 0, 2).reshape(shape[2], -1).numpy()
            original = wanted[layer].double().permute(1, 0, 2).reshape(shape[2], -1).numpy()
            assert (np.abs(rows - original) <= halves[:, None] * 1.0001 + 1e-6).all()
            same = np.isclose(rows, said, rtol=1e-5, atol=1e-5)
            assert same.mean() > 0.999  # a number right between two codes may fall either way


@pytest.mark.parametrize("mode", MODES)
def test_levels_are_best_first_and_smaller_each_time(mode: str) -> None:
    codec = profiled(mode)
    keys, values = (tensor[0] for tensor in blocks(1))
    sizes = [sum(map(len, segments(codec, keys, values, level))) for level in LEVELS]
    errors = [float((round_trip(codec, keys, values, level)[0] - keys).norm()) for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert len(set(sizes)) == len(set(errors)) == len(set(codec.levels)) == 4


def test_earlier_layers_are_finer() -> None:
    keys, values = blocks(1, (6, 2, 16, 32))
    same = keys[:, :1].expand_as(keys).contiguous()[0], values[:, :1].expand_as(values).contiguous()[0]
    for mode, cuts in (("paper", [0, 2, 4]), ("released", [0, 2])):
        codec = profiled(mode, (6, 2, 16, 32))
        found = round_trip(codec, *same)
        error = [float((found[0][layer] - same[0][layer]).norm()) for layer in range(6)]
        for a, b in zip(range(5), range(1, 6), strict=True):
            assert (error[b] > error[a] * 1.2) if b in cuts else error[b] == pytest.approx(error[a], rel=1e-5)


def test_a_distribution_for_each_channel_pays() -> None:
    """The same codes with all channels of a layer alike take more bytes."""
    keys, values = blocks(33)
    codec = CacheGenCodec.profile(keys[:32], values[:32], CacheGenOptions(mode="released"))
    pooled = []
    for table in codec._ends:
        slots = np.diff(table.astype(float), axis=-1, prepend=0)
        mean = np.broadcast_to(slots.mean((3, 4), keepdims=True), slots.shape)
        pooled.append(ends_of(mean[..., :31], table.shape[-1]))
    alike = CacheGenCodec(codec._options, pooled)
    own, shared = (sum(map(len, segments(c, keys[32], values[32]))) for c in (codec, alike))
    assert own < 0.9 * shared


@pytest.mark.parametrize("mode", MODES)
def test_codes_that_no_sample_showed_still_pass(mode: str) -> None:
    flat = torch.zeros(2, *SHAPE)
    codec = CacheGenCodec.profile(flat, flat, CacheGenOptions(mode=mode))
    keys, values = (tensor[0] for tensor in blocks(1))
    trained = profiled(mode, levels=3)
    for level in range(3):
        ours, theirs = (round_trip(c, keys, values, level) for c in (codec, trained))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_zeros_and_outliers_are_safe(mode: str) -> None:
    codec = profiled(mode)
    zero = torch.zeros(SHAPE, dtype=torch.float16)
    assert all(torch.equal(tensor, zero) for tensor in round_trip(codec, zero, zero))
    large = torch.full(SHAPE, torch.finfo(torch.float16).max, dtype=torch.float16)
    large[:, :, ::3] *= -1  # distances twice as large as any number
    for tensor in round_trip(codec, large, -large):
        assert tensor.isfinite().all()
        assert float(tensor.abs().float().min()) > 0.98 * 65504
    keys = blocks(1)[0][0]
    for bad in (float("nan"), float("inf")):
        spoilt = keys.clone()
        spoilt[1, 0, 12, 3] = bad
        for pair in ((spoilt, keys), (keys, spoilt)):
            with pytest.raises(ValueError, match="cannot be quantised"):
                codec.encode(*pair)


@pytest.mark.parametrize("half", [0x7C00, 0x7E00, 0xBC00], ids=["inf", "nan", "negative"])
@pytest.mark.parametrize("mode", MODES)
def test_scales_that_no_encoder_writes_are_refused(mode: str, half: int) -> None:
    codec = profiled(mode)
    keys, values = (tensor[0] for tensor in blocks(1))
    part = segments(codec, keys, values)[0]
    for token in (0, 15, 16, 31):  # of keys, then of values
        at = 4 + 2 * token
        with pytest.raises(ValueError, match="a scale is negative or no number"):
            back(codec, [part[:at] + half.to_bytes(2, "little") + part[at + 2 :]], keys)


def test_specs_tell_mode_level_and_tables() -> None:
    codecs = [profiled("paper"), profiled("released"), profiled("paper", levels=3)]
    codecs.append(CacheGenCodec.profile(*blocks(4, seed=8), CacheGenOptions(levels=4)))
    specs = [spec for codec in codecs for spec in codec.levels]
    assert len(set(specs)) == len(specs) == 15
    assert all(len(spec) <= 64 and spec.isascii() for spec in specs)
    assert specs[1].startswith("cachegen(level=1,mode=paper,tables=")
    assert profiled("paper").levels == codecs[0].levels


def test_tables_lie_beside_a_tier() -> None:
    codec = profiled("paper")
    data = codec.tables()
    again = CacheGenCodec.from_tables(data, CacheGenOptions(levels=4))
    assert again.levels == codec.levels
    keys, values = (tensor[0] for tensor in blocks(1))
    parts = segments(codec, keys, values, 2)
    assert segments(again, keys, values, 2) == parts
    assert all(torch.equal(a, b) for a, b in zip(back(again, parts, keys, 2), back(codec, parts, keys, 2), strict=True))
    for options in (CacheGenOptions(), CacheGenOptions(levels=4, mode="released")):
        with pytest.raises(ValueError, match=r"tables of cachegen\(levels=4,mode=paper\)"):
            CacheGenCodec.from_tables(data, options)


def test_changed_tables_are_refused() -> None:
    data = profiled("released", (1, 1, 16, 4), levels=1).tables()
    rng = np.random.default_rng(0)
    cuts = [data[:n] for n in (*range(0, len(data), 7), len(data) - 1)] + [data + b"\x00"]
    flips = []
    for bit in rng.integers(0, 8 * len(data), 300):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(changed))
    for bad in cuts + flips:
        with pytest.raises(ValueError, match=r"tables of a codec"):
            CacheGenCodec.from_tables(bad, CacheGenOptions(levels=1, mode="released"))


def test_tables_are_of_one_model() -> None:
    codec = profiled("paper")
    for shape in ((2, *SHAPE[1:]), (3, 1, 16, 32), (3, 2, 16, 16)):
        keys, values = (tensor[0] for tensor in blocks(1, shape))
        with pytest.raises(ValueError, match="cachegen: "):
            codec.encode(keys, values)
    keys, values = (tensor[0] for tensor in blocks(1, (3, 2, 64, 32)))  # another block size is the same model
    assert float((round_trip(codec, keys, values)[0] - keys).norm() / keys.norm()) < 0.05


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="cachegen: levels=0 must be 1 to 4"):
        CacheGenOptions(levels=0)
    with pytest.raises(UsageError, match="cachegen: mode='torch' must be one of paper, released"):
        CacheGenOptions(mode="torch")
