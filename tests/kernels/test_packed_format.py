"""Packed pages: bytes, formulas of the papers, places in memory, sealing by every kernel family."""

import numpy as np
import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.kernels import available_kernels, kernels_for
from kvwise.kernels.packed import Codes, Float8, PackedArena, PageFormat, Part, Plain, pack, unpack
from tests.kernels.packed_cases import arena_for, encoded

CPU = torch.device("cpu")

PARTS: dict[str, Part] = {
    **{f"{bits} bits per channel": Codes(bits, "channel", 32) for bits in range(1, 9)},
    **{f"{bits} bits per token": Codes(bits, "token", 32) for bits in range(1, 9)},
    "wide group": Codes(4, "token", 1024),
    "narrow group": Codes(3, "channel", 4),
    "split keys": Codes(8, "channel", 64, split=True),
    "split values": Codes(8, "token", 128, split=True),
    "float8": Float8(),
    "bfloat16": Plain(torch.bfloat16, 64),
}


def rows_of(seed: int, n: int = 3, tokens: int = 64, dim: int = 64) -> torch.Tensor:
    """float16 noise with an outlier channel, and one page of constants."""
    rows = torch.randn(n, tokens, dim, generator=torch.Generator().manual_seed(seed))
    rows[:, :, 5] *= 20
    rows[-1] = 0.75
    return rows.half()


@pytest.mark.parametrize("name", PARTS)
def test_pack_is_the_formula(name: str) -> None:
    part, rows = PARTS[name], rows_of(1)
    packed = pack(rows, part)
    for upper_only in (False, True):
        found = unpack(packed, part, 64, 64, upper_only=upper_only).double().numpy()
        for page, wanted in zip(found, rows.float().numpy(), strict=True):
            target = encoded(wanted, part, upper_only=upper_only)
            # Halfway between two codes either is as near: a handful of numbers may differ by one step.
            apart = np.abs(page - target) > 1e-5 * (1 + np.abs(target))
            assert apart.mean() < 2e-3
            error, best = np.abs(page - wanted), np.abs(target - wanted)
            assert (error <= best * 1.001 + 1e-3).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_what_bits_say(bits: int) -> None:
    form = PageFormat(Codes(bits, "channel", 64), Codes(bits, "token", 128), page_tokens=64, head_dim=128)
    assert form.key_bytes == 64 * 128 * bits // 8 + 128 * 4
    assert form.value_bytes == 64 * 128 * bits // 8 + 64 * 4
    assert pack(rows_of(0, dim=128), form.keys).shape == (3, form.key_bytes)
    assert pack(rows_of(0, dim=128), form.values).shape == (3, form.value_bytes)
    assert form.bits_per_element == bits + (16 * 2 / 64 + 16 * 2 / 128) / 2


def test_bytes_of_other_parts() -> None:
    form = PageFormat(Plain(torch.float16, 80), Float8(), page_tokens=128, head_dim=128)
    assert form.key_bytes == 128 * 80 * 2
    assert form.value_bytes == 128 * 128 + 64
    assert PageFormat(Codes(2, "channel", 32), Codes(2, "token", 32), 128, 128).bits_per_element == 3.0
    assert PageFormat(
        Codes(8, "channel", 128, split=True), Codes(8, "token", 128, split=True), 128, 128
    ).page_bytes == 2 * 128 * (128 + 4)


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_dims_that_do_not_fill_units(bits: int) -> None:
    rows = rows_of(2, tokens=24, dim=80)
    for part in (Codes(bits, "channel", 8), Codes(bits, "token", 40)):
        page = unpack(pack(rows, part), part, 24, 80)[0].double().numpy()
        target = encoded(rows[0].float().numpy(), part)
        assert (np.abs(page - target) > 1e-5 * (1 + np.abs(target))).mean() < 5e-3


def test_pages_lie_where_the_arena_says() -> None:
    form = PageFormat(Float8(), Float8(), page_tokens=16, head_dim=32)
    halves = tuple(torch.zeros(2, form.page_bytes * 2 + 64, dtype=torch.uint8) for _ in range(2))
    arena = PackedArena(halves, form)
    assert (arena.per_half, arena.num_pages) == (2, 8)
    rows = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, form.page_bytes)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    arena.scatter(rows[order], order)
    for page in range(8):
        block, within = divmod(page, 4)
        start = within % 2 * form.page_bytes
        assert (halves[within // 2][block, start : start + form.page_bytes] == page).all()
        assert (arena.gather(torch.tensor([page])) == page).all()
    assert all((half[:, 2 * form.page_bytes :] == 0).all() for half in halves)


@pytest.mark.parametrize("kernels", available_kernels(CPU))
@pytest.mark.parametrize("name", PARTS)
def test_every_family_seals_the_same_bytes(name: str, kernels: str) -> None:
    """Bit for bit what `pack` makes of the rows, wherever they lie; nothing else is touched."""
    part, chosen = PARTS[name], kernels_for(CPU, kernels)
    form = PageFormat(part, part, page_tokens=64, head_dim=64)
    g = torch.Generator().manual_seed(3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arena = rows_of(4, n=30, tokens=16).to(dtype)
        packed = arena_for(form, 12)
        before = packed.gather(torch.arange(packed.num_pages))
        slots = torch.randperm(30 * 16, generator=g)[: 5 * 64].view(5, 64)
        pages = torch.randperm(packed.num_pages, generator=g)[:5]
        chosen.seal_keys(arena, slots, packed, pages)
        chosen.seal_values(arena, slots.flip(0), packed, pages)
        rows = arena.flatten(0, 1)[slots]
        wanted = before.clone()
        wanted[pages] = torch.cat([pack(rows, part), pack(rows.flip(0), part)], 1)
        found = packed.gather(torch.arange(packed.num_pages))
        assert same_but_padding(found, wanted, form)
        keys, values = chosen.unseal(packed, pages)
        assert torch.equal(keys, unpack(wanted[pages, : form.key_bytes], part, 64, 64))
        assert torch.equal(values, unpack(wanted[pages, form.key_bytes :], part, 64, 64))


def same_but_padding(found: torch.Tensor, wanted: torch.Tensor, form: PageFormat) -> bool:
    """Equal, except that bytes behind a float8 scale are anyone's."""
    same = found == wanted
    for part, start, size in (
        (form.keys, 0, form.key_bytes),
        (form.values, form.key_bytes, form.value_bytes),
    ):
        if isinstance(part, Float8):
            same[:, start + form.page_tokens * form.head_dim + 4 : start + size] = True
    return bool(same.all())


@pytest.mark.parametrize("kernels", available_kernels(CPU))
@pytest.mark.parametrize("part", [Codes(2, "token", 32), Codes(5, "token", 64), Plain(torch.float16, 64)], ids=str)
def test_value_rows_one_by_one_equal_a_page(part: Part, kernels: str) -> None:
    """Rows packed in any order, over garbage, make the page that sealing it whole makes; others stay."""
    form = PageFormat(Codes(2, "channel", 32), part, page_tokens=64, head_dim=64)
    chosen, arena = kernels_for(CPU, kernels), rows_of(5, n=8, tokens=16)
    whole, single = arena_for(form, 6), arena_for(form, 6)
    pages = torch.tensor([4, 1])
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0)).view(2, 64)
    chosen.seal_values(arena, slots, whole, pages)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    for some in (order[:50], order[50:51], order[51:]):
        targets = pages[some // 64] * 64 + some % 64
        chosen.seal_value_rows(arena, slots.flatten()[some], single, targets)
        rows = single.format.page_tokens
        _, values = chosen.unseal(single, targets // rows)
        _, wanted = chosen.unseal(whole, targets // rows)
        at = torch.arange(len(some))
        assert torch.equal(values[at, targets % rows], wanted[at, targets % rows])
    assert torch.equal(chosen.unseal(single, pages)[1], chosen.unseal(whole, pages)[1])


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_chosen_channels(kernels: str) -> None:
    form = PageFormat(Plain(torch.float16, 40), Plain(torch.bfloat16, 64), page_tokens=16, head_dim=64)
    chosen, arena = kernels_for(CPU, kernels), rows_of(6, n=8, tokens=16)
    packed = arena_for(form, 6)
    channels = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:40] for i in range(2)])
    slots = torch.arange(32).view(2, 16).clone()
    slots[1, 9:] = slots[1, 8]  # the last page is not full
    chosen.seal_keys(arena, slots, packed, torch.tensor([3, 0]), channels)
    keys, _ = chosen.unseal(packed, torch.tensor([3, 0]))
    rows = arena.flatten(0, 1).float()
    for n in range(2):
        assert torch.equal(keys[n], rows[slots[n]][:, channels[n]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="1 to 8 bits, got 9"):
        Codes(9, "token", 32)
    with pytest.raises(UsageError, match="groups of 48 do not divide the 64 tokens"):
        PageFormat(Codes(4, "channel", 48), Float8(), 64, 64)
    with pytest.raises(UsageError, match="pass bits=8"):
        Codes(4, "token", 32, split=True)
    arena = torch.zeros(2, 100, dtype=torch.uint8)
    with pytest.raises(UsageError, match="does not fit half a block of 100"):
        PackedArena((arena, arena), PageFormat(Float8(), Float8(), 64, 64))


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_sealing_that_cannot_be_is_refused(kernels: str) -> None:
    chosen, arena = kernels_for(CPU, kernels), rows_of(7, n=8, tokens=16)
    channel = arena_for(PageFormat(Plain(torch.float16, 40), Codes(4, "channel", 32), 32, 64), 6)
    slots, pages = torch.arange(32)[None], torch.tensor([0])
    with pytest.raises(UsageError, match="share scales over tokens"):
        chosen.seal_value_rows(arena, slots[0], channel, torch.arange(32))
    with pytest.raises(UsageError, match="pass channels="):
        chosen.seal_keys(arena, slots, channel, pages)
    with pytest.raises(UsageError, match="do not fill 1 pages of 32"):
        chosen.seal_values(arena, slots[:, :16], channel, pages)
