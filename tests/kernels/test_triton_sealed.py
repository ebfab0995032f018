"""Triton over packed pages against the reference: on a GPU if there is one, else in Triton's interpreter."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install kvwise[triton])", allow_module_level=True)

from kvwise.core.errors import UsageError
from kvwise.kernels import Kernels, Segment, kernels_for
from kvwise.kernels import triton as launches
from kvwise.kernels.packed import Codes, Float8, PackedArena, PageFormat, Part, Plain
from tests.kernels.packed_cases import PackedCase, PackedProblem, arena_for, make_packed, run
from tests.kernels.test_sealed import KIVI, SMALL, THINK

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = kernels_for(CPU, "reference")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_for(DEVICE, "triton")


def moved(thing: Any, device: torch.device) -> Any:
    """The same in another memory, however deep tensors lie in it."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, tuple):
        return tuple(moved(x, device) for x in thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, PackedCase | PageFormat):
        given = {f.name: moved(getattr(thing, f.name), device) for f in dataclasses.fields(thing)}
        return type(thing)(**given)  # type: ignore[operator]
    return thing


def check(kernels: Kernels, problem: PackedProblem, *more: Segment, tolerance: float = 2e-5) -> tuple[Tensor, ...]:
    """The kernels' out, lse and masses, which are the reference's."""
    wanted = run(REFERENCE, problem, *more)
    found = moved(run(kernels, moved(problem, DEVICE), *moved(more, DEVICE)), CPU)
    for name, x, y in zip(("out", "lse", "open mass", "packed mass"), found, wanted, strict=True):
        torch.testing.assert_close(
            x.float(), y.float(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SMALL)
def test_triton_equals_reference(name: str, kernels: Kernels) -> None:
    check(kernels, make_packed(SMALL[name].with_(num_heads=2 if name == "think, prefill" else 1)))


FORMATS = {
    **{
        f"{bits} bits": PageFormat(Codes(bits, "channel", 16 << bits % 2), Codes(bits, "token", 1024 >> bits), 32, 32)
        for bits in range(1, 9)
    },
    "per token and per channel": PageFormat(Codes(3, "token", 16), Codes(5, "channel", 32), 32, 32),
    "split, either axis": PageFormat(Codes(8, "token", 32, split=True), Codes(8, "channel", 32, split=True), 32, 32),
    "groups of few": PageFormat(Codes(4, "channel", 4), Codes(4, "token", 8), 32, 32),
    "nothing fills its units": PageFormat(Codes(5, "channel", 12), Codes(3, "token", 10), 24, 40),
    "two tiles a page, one not full": PageFormat(Codes(3, "channel", 40), Codes(2, "token", 16), 80, 32),
    "two tiles of two groups": PageFormat(Codes(2, "channel", 128), Codes(6, "token", 32), 128, 32),
    "float8 and codes": PageFormat(Float8(), Codes(2, "channel", 16), 16, 24),
    "plain and float8": PageFormat(Plain(torch.bfloat16, 20), Float8(), 8, 20),
    "few of the channels": PageFormat(Plain(torch.float16, 9), Plain(torch.float32, 40), 12, 40),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, kernels: Kernels) -> None:
    form = FORMATS[name]
    case = PackedCase(form, (2,), (2,), 20, values_behind=20, group=3, num_heads=1, seed=6)
    check(kernels, make_packed(case))


# The interpreter's products of bfloat16 are those of its bits: on a GPU only.
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_queries_of_half_precision(dtype: torch.dtype, kernels: Kernels) -> None:
    problem = make_packed(SMALL["kivi"].with_(num_heads=1))
    problem.queries = problem.queries.to(dtype)
    out = check(kernels, problem, tolerance=4e-3 if dtype == torch.float16 else 3e-2)[0]
    assert out.dtype == dtype


def test_segments_with_and_without_packed_pages(kernels: Kernels) -> None:
    problem, other = make_packed(SMALL["kivi"]), make_packed(SMALL["think"].with_(seed=30, causal=False))
    lengths = torch.full_like(problem.segment.lengths, 21)
    open_only = dataclasses.replace(problem.segment, sealed=None, mass=None, causal=False, lengths=lengths)
    check(kernels, problem, open_only, dataclasses.replace(other.segment, mass=None))


@pytest.mark.parametrize(("window", "positions"), [(None, False), (50, False), (50, True)])
def test_parts_over_the_length(
    window: int | None, positions: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts, also ones without a key, the answer is one, and the same whenever it is asked for."""
    case = PackedCase(KIVI, (2, 1), (3, 0), 90, 40, num_heads=1, window=window, positions=positions, seed=14)
    problem = make_packed(case)
    for keys, least in ((70, 4), (40, 8)):
        monkeypatch.setattr(launches, "PART_KEYS", keys)
        assert launches._num_parts(1, problem.segment) >= least
        found = check(kernels, problem)
    again = moved(run(kernels, moved(problem, DEVICE)), CPU)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_many_programs_or_few_keys_are_not_split() -> None:
    segment = make_packed(SMALL["kivi"]).segment
    assert segment.sealed is not None
    long = dataclasses.replace(segment, tables=torch.zeros(3, 2, 10000, dtype=torch.int32))
    assert launches._num_parts(1, segment) == 1
    assert launches._num_parts(8, long) == launches.PROGRAMS // 8
    assert launches._num_parts(launches.PROGRAMS + 1, long) == 1
    many = dataclasses.replace(segment.sealed, tables=torch.zeros(3, 2, 100, dtype=torch.int32))
    assert launches._num_parts(2, dataclasses.replace(segment, sealed=many)) > 100 * 64 // launches.PART_KEYS - 1


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_rows_not_yet_written_are_never_read(axis: str, kernels: Kernels) -> None:
    """Values sealed up to the middle of a page: what lies behind them (nan where rows stand alone) changes nothing."""
    form = PageFormat(KIVI.keys, Codes(2, axis, 32), 64, 64)  # type: ignore[arg-type]
    problem = make_packed(PackedCase(form, (1,), (1,), num_heads=1, open_tokens=200, seed=5))
    sealed = problem.segment.sealed
    assert sealed is not None

    def one(number: int) -> Tensor:
        return torch.tensor([[number]], dtype=torch.int32)

    fresh = dataclasses.replace(sealed, key_lengths=one(64), value_lengths=one(37), open_base=one(37))
    problem = dataclasses.replace(problem, segment=dataclasses.replace(problem.segment, lengths=one(90), sealed=fresh))
    wanted = run(REFERENCE, problem)
    page = sealed.tables[0, 0, :1].long()
    rows = sealed.arena.gather(page)
    if axis == "token":
        rows[0, form.key_bytes + 64 * 64 * 2 // 8 :].view(torch.float16).view(2, 2, 64)[:, :, 37:] = torch.nan
    sealed.arena.scatter(rows, page)
    found = moved(run(kernels, moved(problem, DEVICE)), CPU)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_rows_that_no_sequence_owns(kernels: Kernels) -> None:
    """Out 0, lse -inf, whatever memory held: here torch fills it with nan."""
    problem = make_packed(PackedCase(THINK, (1,), (1,), num_heads=1))
    problem.queries = torch.cat([problem.queries, problem.queries + 1])
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = check(kernels, problem)[:2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


PARTS: list[Part] = [
    Codes(3, "channel", 16),
    Codes(7, "token", 20),
    Codes(8, "channel", 32, split=True),
    Float8(),
    Plain(torch.bfloat16, 40),
]


def rows_of(seed: int, pages: int = 8, dim: int = 40) -> Tensor:
    return torch.randn(pages, 16, dim, generator=torch.Generator().manual_seed(seed)).half()


def copied(packed: PackedArena) -> PackedArena:
    return PackedArena(tuple(half.clone().to(DEVICE) for half in packed.halves), packed.format)  # type: ignore[arg-type]


def same_memory(one: PackedArena, other: PackedArena) -> bool:
    return all(torch.equal(x.cpu(), y) for x, y in zip(one.halves, other.halves, strict=True))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_sealing_leaves_the_bytes_of_the_reference(part: Part, kernels: Kernels) -> None:
    """Bytes of other pages and between pages stay as they are."""
    form = PageFormat(part, part, page_tokens=32, head_dim=40)
    target = arena_for(form, 8)
    mine = copied(target)
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:96].view(3, 32)
    pages, arena = torch.tensor([3, 1, 8]), rows_of(0)
    for family, packed, device in ((REFERENCE, target, CPU), (kernels, mine, DEVICE)):
        family.seal_keys(arena.to(device), slots.to(device), packed, pages.to(device))
        family.seal_values(arena.to(device), slots.flip(0).to(device), packed, pages.to(device))
    assert same_memory(mine, target)
    for x, y in zip(kernels.unseal(mine, pages.to(DEVICE)), REFERENCE.unseal(target, pages), strict=True):
        assert torch.equal(x.cpu(), y)


def test_chosen_channels(kernels: Kernels) -> None:
    packed = moved(arena_for(THINK, 8), DEVICE)
    arena, slots = rows_of(1, dim=64), torch.arange(32).view(2, 16)
    channels = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:40] for i in range(2)])
    pages = torch.tensor([7, 0])
    kernels.seal_keys(*(moved(x, DEVICE) for x in (arena, slots, packed, pages, channels)))
    found = kernels.unseal(packed, pages.to(DEVICE))[0].cpu()
    for n in range(2):
        assert torch.equal(found[n], arena[n].float()[:, channels[n]])


ALONE: list[Part] = [Codes(bits, "token", 20) for bits in range(1, 9)]
ALONE += [Codes(8, "token", 40, split=True), Plain(torch.float16, 40)]


@pytest.mark.parametrize("part", ALONE, ids=str)
def test_value_rows_leave_the_bytes_of_the_reference(part: Part, kernels: Kernels) -> None:
    """Several rows of one page at once, next to rows that stay; over memory that is all ones."""
    form = PageFormat(Codes(2, "channel", 36), part, page_tokens=36, head_dim=40)
    target = arena_for(form, 8)
    mine = copied(target)
    g = torch.Generator().manual_seed(2)
    for n in (11, 1):
        slots, places = torch.randperm(128, generator=g)[:n], torch.randperm(72, generator=g)[:n]
        places = torch.where(places < 36, places + 5 * 36, places)
        for family, packed, device in ((REFERENCE, target, CPU), (kernels, mine, DEVICE)):
            family.seal_value_rows(rows_of(3).to(device), slots.to(device), packed, places.to(device))
        assert same_memory(mine, target)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kernels.seal_value_rows(rows_of(3).to(DEVICE), none, mine, none)
    assert same_memory(mine, target)


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: sizes or numbers read back to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim"}, func
        if "index" in func.overloadpacket.__name__ and func.overloadpacket.__name__ != "index_select":
            assert not any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(kernels: Kernels) -> None:
    problem = moved(make_packed(PackedCase(KIVI, (1,), (1,), num_heads=1, mass_rows=(1,), window=9)), DEVICE)
    packed, slots = problem.segment.sealed.arena, torch.arange(64, device=DEVICE)
    pages = torch.tensor([0], device=DEVICE)
    calls: list[Callable[[], object]] = [
        lambda: run(kernels, problem),
        lambda: kernels.seal_keys(problem.segment.keys, slots[None], packed, pages),
        lambda: kernels.seal_values(problem.segment.keys, slots[None], packed, pages),
        lambda: kernels.seal_value_rows(problem.segment.keys, slots[:3], packed, slots[:3]),
        lambda: kernels.unseal(packed, pages),
    ]
    with NoWaiting():
        for call in calls:
            call()


def test_what_cannot_be_read_by_words_is_refused(kernels: Kernels) -> None:
    problem = make_packed(SMALL["float8"])
    sealed = problem.segment.sealed
    assert sealed is not None
    odd = PackedArena(tuple(half[:, :-2].contiguous() for half in sealed.arena.halves), sealed.arena.format)
    segment = dataclasses.replace(problem.segment, sealed=dataclasses.replace(sealed, arena=odd))
    with pytest.raises(UsageError, match="must be multiples of 4"):
        run(kernels, moved(dataclasses.replace(problem, segment=segment), DEVICE))
    with pytest.raises(UsageError, match="share scales over tokens"):
        kernels.seal_value_rows(*moved((rows_of(0, dim=64), torch.arange(1), sealed.arena, torch.arange(1)), DEVICE))
