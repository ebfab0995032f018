"""Rows and pages that move: every kernel family against plain indexing, and the choice of a family."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import available_kernels, kernels_for
from kvwise.kernels.base import Kernels

CPU = torch.device("cpu")
FAMILIES = available_kernels(CPU)
NATIVE = [name for name in FAMILIES if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=FAMILIES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_for(CPU, request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 64])
def test_append_to_blocks(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    size, heads, stride, offset = 4, 3, 6, 3
    keys, values = random(5 * stride, size, dim, dtype=dtype), random(5 * stride, size, dim, seed=1, dtype=dtype)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    slots = torch.tensor([17, 3, 8, 0])
    # heads first, as a model's projection leaves them
    new_keys, new_values = random(heads, 4, dim, seed=2).transpose(0, 1), random(heads, 4, dim, seed=3).transpose(0, 1)
    for t, slot in enumerate(slots.tolist()):
        for h in range(heads):
            page = slot // size * stride + offset + h
            wanted_keys[page, slot % size] = new_keys[t, h].to(dtype)
            wanted_values[page, slot % size] = new_values[t, h].to(dtype)
    kernels.append(new_keys, new_values, keys, values, slots, page_stride=stride, page_offset=offset)
    assert torch.equal(keys, wanted_keys)
    assert torch.equal(values, wanted_values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_to_pages(kernels: Kernels, dtype: torch.dtype) -> None:
    keys, values = random(9, 4, 8, dtype=dtype), random(9, 4, 6, seed=1, dtype=dtype)
    slots = torch.tensor([[5, 30], [0, 17]])
    new_keys, new_values = random(2, 2, 8, seed=2, dtype=dtype), random(2, 2, 6, seed=3, dtype=dtype)
    kernels.append(new_keys, new_values, keys, values, slots)
    assert torch.equal(keys.flatten(0, 1)[slots], new_keys)
    assert torch.equal(values.flatten(0, 1)[slots], new_values)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_equals_torch(name: str, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow, infinities: to the bit."""
    numbers = torch.cat(
        [
            torch.arange(0, 2**16, 7).to(torch.uint16).view(dtype).float(),
            random(4096, seed=4) * torch.logspace(-9, 9, 4096),
            torch.tensor([65519.9, 65520.0, 1e38, -1e38, torch.inf, -torch.inf, 0.0, -0.0, 5.96e-8, 2.98e-8, 2.99e-8]),
        ]
    )
    numbers = numbers[~numbers.isnan()]
    between = torch.cat([numbers, torch.nextafter(numbers, torch.tensor(torch.inf)), numbers * (1 + 2**-9)])
    arena = torch.zeros(1, 1, len(between), dtype=dtype)
    kernels_for(CPU, name).append(between.view(1, 1, -1), between.view(1, 1, -1), arena, arena, torch.tensor([0]))
    assert torch.equal(arena.view(torch.int16).flatten(), between.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
@pytest.mark.parametrize("dims", [(), (24,)])
def test_gather_and_scatter(kernels: Kernels, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    arena = (random(6, 4, *dims) * 100).to(dtype)
    slots = torch.tensor([23, 0, 7, 7, 12])
    rows = kernels.gather(arena, slots)
    assert torch.equal(rows, arena.flatten(0, 1)[slots])
    into = torch.empty_like(rows)
    assert kernels.gather(arena, slots, into).data_ptr() == into.data_ptr()
    assert torch.equal(into, rows)
    target = torch.zeros_like(arena)
    wanted = torch.zeros_like(arena)
    slots = torch.tensor([3, 20, 9, 1, 0])
    wanted.view(-1, *dims)[slots] = rows
    kernels.scatter(rows, target, slots)
    assert torch.equal(target, wanted)


@given(moves=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20), name=st.sampled_from(FAMILIES))
def test_moves_happen_in_order(moves: list[tuple[int, int]], name: str) -> None:
    arena = torch.arange(24, dtype=torch.float32).view(3, 4, 2)
    wanted = arena.clone()
    for source, target in moves:
        wanted.view(12, 2)[target] = wanted.view(12, 2)[source].clone()
    source, target = (torch.tensor([move[i] for move in moves], dtype=torch.int64) for i in (0, 1))
    kernels_for(CPU, name).move_slots(arena, source, target)
    assert torch.equal(arena, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_between_arenas(kernels: Kernels, dtype: torch.dtype) -> None:
    source, target = random(6, 4, 8, dtype=dtype), random(9, 4, 8, seed=1, dtype=dtype)
    wanted = target.clone()
    wanted[[8, 0, 3]] = source[[1, 5, 0]]
    kernels.copy_pages(source, torch.tensor([1, 5, 0]), target, torch.tensor([8, 0, 3]))
    assert torch.equal(target, wanted)


def test_nothing_moves_nothing(kernels: Kernels) -> None:
    arena, none = random(2, 4, 8), torch.zeros(0, dtype=torch.int64)
    before = arena.clone()
    assert kernels.gather(arena, none).shape == (0, 8)
    kernels.scatter(torch.zeros(0, 8), arena, none)
    kernels.move_slots(arena, none, none)
    kernels.copy_pages(arena, none, arena, none)
    kernels.append(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), arena, arena, none)
    assert torch.equal(arena, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_move_to_other_positions(kernels: Kernels, interleaved: bool) -> None:
    """Rotating from 0 to p + d equals rotating from 0 to p, then by d; dims behind the rotary ones stay."""
    keys, inv_freq = random(50, 20).double().float(), 10000.0 ** (-torch.arange(8) / 8)
    start, delta = torch.arange(50), torch.arange(50) * 37 - 900
    there = kernels.rotate(keys, start + delta, inv_freq, interleaved=interleaved)
    steps = kernels.rotate(
        kernels.rotate(keys, start, inv_freq, interleaved=interleaved), delta, inv_freq, interleaved=interleaved
    )
    torch.testing.assert_close(there, steps, rtol=1e-5, atol=1e-5)
    assert torch.equal(there[:, 16:], keys[:, 16:])
    x, y = (keys[7, 0], keys[7, 1]) if interleaved else (keys[7, 0], keys[7, 8])
    angle = torch.tensor(float(7 + delta[7]))
    torch.testing.assert_close(there[7, 0], x * angle.cos() - y * angle.sin(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_rows", "dim", "half", "num_ways"), [(5, 20, 8, 3), (700, 64, 32, 4), (9, 7, 0, 2)])
def test_rows_turn_by_several_angles_each(
    kernels: Kernels, num_rows: int, dim: int, half: int, num_ways: int, interleaved: bool
) -> None:
    """As the same rotations one by one."""
    rows, inv_freq = random(num_rows, dim), 100.0 ** (-torch.arange(half) / max(1, half))
    positions = torch.arange(-3, 4)
    angles = positions.double()[:, None] * inv_freq
    which = torch.randint(len(positions), (num_ways, num_rows), generator=torch.Generator().manual_seed(1))
    turned = kernels.turn(rows, angles.cos().float(), angles.sin().float(), which, interleaved=interleaved)
    assert turned.shape == (num_ways, num_rows, dim)
    for way, by in zip(turned, which, strict=True):
        expected = kernels_for(CPU, "reference").rotate(rows, positions[by], inv_freq, interleaved=interleaved)
        torch.testing.assert_close(way, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_turn_refuses_angles_that_are_not_there(name: str) -> None:
    cos, kernels = torch.ones(4, 8), kernels_for(CPU, name)
    with pytest.raises(UsageError, match="row 1 turns by angle 4, there are 4"):
        kernels.turn(random(2, 16), cos, cos, torch.tensor([[0, 4]]))
    with pytest.raises(UsageError, match="do not fit angles"):
        kernels.turn(random(2, 15), cos, cos, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("name", NATIVE)
def test_slots_outside_the_arena_are_refused(name: str) -> None:
    kernels, arena = kernels_for(CPU, name), random(2, 4, 8)
    before = arena.clone()
    far, near = torch.tensor([8]), torch.tensor([0])
    for call in (
        lambda: kernels.gather(arena, far),
        lambda: kernels.gather(arena, -near - 1),
        lambda: kernels.scatter(random(1, 8), arena, far),
        lambda: kernels.move_slots(arena, near, far),
        lambda: kernels.copy_pages(arena, near, arena, torch.tensor([2])),
        lambda: kernels.append(random(1, 1, 8), random(1, 1, 8), arena, arena, far),
    ):
        with pytest.raises(UsageError, match=r"outside the arena of [28] slots"):
            call()
    assert torch.equal(arena, before)
    with pytest.raises(UsageError, match="must be contiguous"):
        kernels.gather(arena.transpose(0, 1), near)


def test_the_fastest_family_is_chosen() -> None:
    assert kernels_for(CPU).name == FAMILIES[0]
    for name in FAMILIES:
        assert kernels_for(CPU, name).name == name
    with pytest.raises(UsageError, match="no kernels called 'cpu-mmx'"):
        kernels_for(CPU, "cpu-mmx")


def test_without_native_kernels_the_reference_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import importlib.util

    from kvwise import kernels

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kvwise._native" else find(name))
    kernels._say_slow_once.cache_clear()
    assert [kernels_for(CPU).name for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "without its native kernels" in caplog.text


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 40)])
def test_angles(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Each position once, however far, forwards and back."""
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    positions = torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(0)) * 12345
    cos, sin, which = kernels.angles(positions, inv_freq)
    assert len(cos) == len(sin) == len(positions.unique())
    wanted = positions.double()[..., None] * inv_freq.double()
    assert torch.allclose(cos[which].double(), wanted.cos(), rtol=0, atol=1e-7)
    assert torch.allclose(sin[which].double(), wanted.sin(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("width", [1, 5, 16, 37, 416])
def test_lowest(kernels: Kernels, width: int) -> None:
    """Few different numbers, so that many are equal: the earliest leaves."""
    generator = torch.Generator().manual_seed(width)
    worth = torch.randint(-3, 4, (200, width), generator=generator).float()
    worth[worth == 3] = torch.inf
    bounds = torch.randint(width + 1, (2, 200), generator=generator, dtype=torch.int32).sort(0).values
    least, where = kernels.lowest(worth, bounds[0], bounds[1])
    for i, (first, stop) in enumerate(bounds.T.tolist()):
        mine = worth[i, first:stop].tolist()
        expected = min(mine, default=torch.inf)
        assert float(least[i]) == expected
        assert expected == torch.inf or int(where[i]) == first + mine.index(expected)


@pytest.mark.parametrize("at", [0, 3, 30, 36])
def test_lowest_of_what_is_no_number(kernels: Kernels, at: int) -> None:
    worth = random(2, 37)
    worth[:, at] = torch.nan
    bounds = torch.tensor([0, 0]), torch.tensor([at + 1, at])
    least, _ = kernels.lowest(worth, *bounds)
    assert bool(least[0].isnan())
    assert not bool(least[1].isnan())


@pytest.mark.parametrize("size", [4, 16])
def test_lowest_mass(kernels: Kernels, size: int) -> None:
    """Few different masses, bounds anywhere in the tables, and now and then nobody who may leave."""
    generator = torch.Generator().manual_seed(size)
    n, width, num_pages = 150, 5, 40
    mass = torch.randint(4, (num_pages, size), generator=generator).float()
    positions = torch.randint(60, (num_pages, size), generator=generator, dtype=torch.int32)
    tables = torch.randint(num_pages, (n, width), generator=generator, dtype=torch.int32)
    bounds = torch.randint(width * size + 1, (2, n), generator=generator, dtype=torch.int32).sort(0).values
    newest = torch.randint(-1, 61, (n,), generator=generator, dtype=torch.int32)
    least, where = kernels.lowest_mass(mass, positions, tables, bounds[0], bounds[1], newest)
    for i, (first, stop) in enumerate(bounds.T.tolist()):
        slots = [(int(tables[i, slot // size]), slot % size) for slot in range(first, stop)]
        mine = [float(mass[slot]) if positions[slot] <= newest[i] else torch.inf for slot in slots]
        expected = min(mine, default=torch.inf)
        assert float(least[i]) == expected
        assert expected == torch.inf or int(where[i]) == first + mine.index(expected)


def test_lowest_mass_of_what_is_no_number(kernels: Kernels) -> None:
    mass, positions = random(2, 8).abs(), torch.arange(16, dtype=torch.int32).view(2, 8)
    mass[1, 3] = torch.nan
    bounds = torch.tensor([0, 0]), torch.tensor([16, 16])
    tables = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    least, _ = kernels.lowest_mass(mass, positions, tables, *bounds, torch.tensor([11, 10]))
    assert bool(least[0].isnan())
    assert float(least[1]) == float(mass.flatten()[:11].min())  # what may not leave is not looked at


@pytest.mark.parametrize("name", NATIVE)
def test_lowest_mass_outside_is_refused(name: str) -> None:
    kernels, column = kernels_for(CPU, name), torch.zeros(3, 4)
    positions, one = column.int(), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(UsageError, match="page 3 lies outside columns of 3 pages"):
        kernels.lowest_mass(column, positions, torch.tensor([[0, 3]]), one, 6 * one, one)
    with pytest.raises(UsageError, match="slots 1 to 9 lie outside a row of 8"):
        kernels.lowest_mass(column, positions, torch.tensor([[0, 1]]), one, 9 * one, one)
    with pytest.raises(UsageError, match="need as many bounds"):
        kernels.lowest_mass(column, positions, torch.tensor([[0, 1]]), one, one.repeat(2), one)
    with pytest.raises(UsageError, match="must be float32 and int32 of one shape"):
        kernels.lowest_mass(column, positions[:2], torch.tensor([[0, 1]]), one, one, one)


@pytest.mark.parametrize("name", NATIVE)
def test_lowest_outside_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="slots 2 to 6 lie outside a row of 5"):
        kernels_for(CPU, name).lowest(random(1, 5), torch.tensor([2]), torch.tensor([6]))
    with pytest.raises(UsageError, match="need as many bounds"):
        kernels_for(CPU, name).lowest(random(1, 5), torch.tensor([2, 3]), torch.tensor([5]))
