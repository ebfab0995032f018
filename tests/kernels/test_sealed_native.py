"""Native attention over packed pages against the reference: exact where asked for, and integer products near it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import Kernels, available_kernels, kernels_for
from kvwise.kernels.packed import Codes, Float8, PageFormat, Part, Plain
from tests.kernels.packed_cases import PackedCase, PackedProblem, make_packed, run
from tests.kernels.test_sealed import KIVI, SMALL, THINK

CPU = torch.device("cpu")
NATIVE = [name for name in available_kernels(CPU) if name.startswith("cpu-")]
REFERENCE = kernels_for(CPU, "reference")


def native(name: str, *, exact: bool = False, threads: int | None = None) -> Kernels:
    from kvwise.kernels.cpu import CpuKernels

    return CpuKernels(name.removeprefix("cpu-"), threads, exact=exact)


def assert_exact(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 3e-5) -> None:
    for name, x, y in zip(("out", "lse", "open mass", "packed mass"), found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def error_of(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("name", SMALL)
def test_exact_equals_reference(name: str, kernels: str) -> None:
    problem = make_packed(SMALL[name])
    assert_exact(run(native(kernels, exact=True), problem), run(REFERENCE, problem))


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("name", SMALL)
def test_integer_products_are_near(name: str, kernels: str) -> None:
    """Out within 3.5 % of exact attention over the same codes; lse and masses as near, none of them misplaced."""
    problem = make_packed(SMALL[name])
    found, wanted = run(native(kernels), problem), run(REFERENCE, problem)
    assert error_of(found[0], wanted[0]) < 0.035
    torch.testing.assert_close(found[1], wanted[1], rtol=0.02, atol=0.02)
    sealed = problem.segment.sealed
    assert problem.segment.mass is not None and sealed is not None and sealed.mass is not None
    for mass, target, before in zip(found[2:], wanted[2:], (problem.segment.mass, sealed.mass), strict=True):
        torch.testing.assert_close(mass == before, target == before, rtol=0, atol=0)
        torch.testing.assert_close(mass - before, target - before, rtol=0.1, atol=0.01)


def parts_for(dim: int) -> dict[str, tuple[Part, Part]]:
    """Keys and values of one format each; every number of bits, folding and not."""
    parts: dict[str, tuple[Part, Part]] = {
        f"{bits} bits": (Codes(bits, "channel", 64 if bits % 2 else 32), Codes(bits, "token", 32 if bits % 3 else 1024))
        for bits in range(1, 9)
    }
    parts |= {
        "split": (Codes(8, "channel", 64, split=True), Codes(8, "token", dim, split=True)),
        "per token and per channel": (Codes(4, "token", 32), Codes(4, "channel", 32)),
        "narrow groups": (Codes(4, "channel", 4), Codes(4, "token", 8)),
        "float8": (Float8(), Float8()),
        "mixed": (Float8(), Codes(2, "token", 32)),
        "fewer channels": (Plain(torch.float16, dim // 2 + 4), Plain(torch.float16, dim)),
        "other dtype": (Plain(torch.bfloat16, dim), Codes(6, "token", 1024)),
    }
    return parts


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("name", parts_for(32))
def test_every_format_and_shape(name: str, dim: int, kernels: str) -> None:
    """Groups of 1, 2, 4 and 7 query heads, one to three queries, ragged lengths and none at all."""
    keys, values = parts_for(dim)[name]
    form = PageFormat(keys, values, page_tokens=128 if dim == 64 else 64, head_dim=dim)
    for group in (1, 2, 4, 7):
        case = PackedCase(
            form,
            queries=(1, 1 + group % 3, 0),
            packed_pages=(3, 2, 0),
            open_tokens=70,
            values_behind=90,
            group=group,
            num_heads=3 if group == 1 else 1,
            dtype=[torch.float16, torch.bfloat16, torch.float32][group % 3],
            seed=group,
        )
        problem = make_packed(case)
        wanted = run(REFERENCE, problem)
        assert_exact(run(native(kernels, exact=True), problem), wanted)
        assert error_of(run(native(kernels), problem)[0], wanted[0]) < 0.035


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_long_codes_lose_nothing(bits: int, kernels: str) -> None:
    form = PageFormat(Codes(bits, "channel", 64), Codes(bits, "token", 128), 64, 128)
    problem = make_packed(PackedCase(form, packed_pages=(4, 2, 3), group=4, seed=bits))
    assert error_of(run(native(kernels), problem)[0], run(REFERENCE, problem)[0]) < 1e-3


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("bits", [2, 4])
def test_integer_error_is_small_beside_the_codes(bits: int, kernels: str) -> None:
    """Also with outlier channels, on which KIVI's groups by channel are built."""
    for outliers in (1.0, 10.0):
        form = PageFormat(Codes(bits, "channel", 64), Codes(bits, "token", 128), 64, 128)
        case = PackedCase(form, queries=(1,), packed_pages=(12,), open_tokens=0, group=4, outliers=outliers, seed=4)
        problem = make_packed(case)
        problem.queries /= outliers**0.5
        plain = PageFormat(Plain(torch.float16, 128), Plain(torch.float16, 128), 64, 128)
        truth = run(REFERENCE, dataclasses.replace(make_packed(case.with_(format=plain)), queries=problem.queries))
        wanted = run(REFERENCE, problem)
        assert error_of(run(native(kernels), problem)[0], wanted[0]) < 0.25 * error_of(wanted[0], truth[0])


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("exact", [False, True])
def test_split_over_length_and_threads(exact: bool, kernels: str) -> None:
    """Parts cut anywhere: within pages, within groups, where values come to be open before keys."""
    case = PackedCase(KIVI, queries=(1, 2), packed_pages=(60, 2), values_behind=130, num_heads=1, group=3, seed=3)
    problem = make_packed(case)
    wanted = run(REFERENCE, problem)
    for threads in (2, 5):
        found = run(native(kernels, exact=exact, threads=threads), problem)
        if exact:
            assert_exact(found, wanted)
        assert error_of(found[0], wanted[0]) < 0.035


@pytest.mark.parametrize("kernels", NATIVE)
def test_windows_begin_anywhere(kernels: str) -> None:
    for window in (1, 7, 33, 64, 100):
        problem = make_packed(PackedCase(KIVI, queries=(1, 3), packed_pages=(3, 2), window=window, seed=window))
        assert_exact(run(native(kernels, exact=True), problem), run(REFERENCE, problem))
        assert error_of(run(native(kernels), problem)[0], run(REFERENCE, problem)[0]) < 0.035


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_segments_with_and_without_packed_pages(kernels: str) -> None:
    """A plain prefix all queries see, a packed one, and one's own packed and open pages: one softmax."""
    problem, other = make_packed(SMALL["kivi"]), make_packed(SMALL["kivi"].with_(seed=30, causal=False))
    open_only = dataclasses.replace(
        problem.segment,
        sealed=None,
        mass=None,
        causal=False,
        lengths=torch.full_like(problem.segment.lengths, 21),
    )
    more = (open_only, dataclasses.replace(other.segment, mass=None))
    wanted = run(REFERENCE, problem, *more)
    chosen = kernels_for(CPU, kernels)
    assert error_of(run(chosen, problem, *more)[0], wanted[0]) < 0.035
    if kernels in NATIVE:
        assert_exact(run(native(kernels, exact=True), problem, *more), wanted)


@pytest.mark.parametrize("kernels", NATIVE)
def test_rows_not_yet_written_are_never_read(kernels: str) -> None:
    """KIVI's values fill a page row by row: bytes of rows still to come (here nan) change nothing."""
    problem = make_packed(PackedCase(KIVI, queries=(1,), packed_pages=(1,), num_heads=1, open_tokens=200, seed=5))
    segment, sealed = problem.segment, problem.segment.sealed
    assert sealed is not None
    fresh = dataclasses.replace(
        segment,
        lengths=torch.tensor([[90]], dtype=torch.int32),
        sealed=dataclasses.replace(
            sealed,
            key_lengths=torch.tensor([[64]], dtype=torch.int32),
            value_lengths=torch.tensor([[37]], dtype=torch.int32),
            open_base=torch.tensor([[37]], dtype=torch.int32),
        ),
    )
    problem = dataclasses.replace(problem, segment=fresh)
    wanted = run(REFERENCE, problem)
    page = sealed.tables[0, 0, :1].long()
    rows = sealed.arena.gather(page)
    steps = rows[0, KIVI.key_bytes + 64 * 64 * 2 // 8 :].view(torch.float16).view(2, 2, 64)
    steps[:, :, 37:] = torch.nan
    sealed.arena.scatter(rows, page)
    for exact in (False, True):
        found = run(native(kernels, exact=exact), problem)
        assert error_of(found[0], wanted[0]) < 0.035
        assert torch.isfinite(found[3]).all()


@pytest.mark.parametrize("kernels", NATIVE)
def test_memory_outside_the_packed_arena_is_never_read(kernels: str) -> None:
    problem = make_packed(SMALL["think"])
    sealed = problem.segment.sealed
    assert sealed is not None

    def refused(match: str, **changes: Tensor) -> None:
        segment = dataclasses.replace(problem.segment, sealed=dataclasses.replace(sealed, **changes))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=match):
            run(native(kernels), dataclasses.replace(problem, segment=segment))

    refused("packed page .* outside the arena", tables=sealed.tables + 1000)
    refused("packed page -", tables=-1 - sealed.tables)
    refused("must be in this order", value_lengths=sealed.key_lengths + 1)
    refused("must be in this order", open_base=sealed.value_lengths + 1)
    refused("keeps channel", key_channels=torch.full((3, 2, 40), 64, dtype=torch.int32))
    more = torch.full_like(problem.segment.lengths, 400)
    with_more = dataclasses.replace(problem, segment=dataclasses.replace(problem.segment, lengths=more))
    with pytest.raises(UsageError, match="its table holds"):
        run(native(kernels), with_more)


@pytest.mark.parametrize("kernels", NATIVE)
def test_sealing_outside_is_refused_and_writes_nothing(kernels: str) -> None:
    problem = make_packed(PackedCase(THINK))
    sealed = problem.segment.sealed
    assert sealed is not None
    arena, packed = problem.segment.values, sealed.arena
    before = [half.clone() for half in packed.halves]
    slots, pages = torch.arange(32).view(2, 16), torch.tensor([0, packed.num_pages])
    with pytest.raises(UsageError, match=r"packed page .* outside"):
        native(kernels).seal_values(arena, slots, packed, pages)
    with pytest.raises(UsageError, match=r"slot .* outside"):
        native(kernels).seal_values(arena, slots + 10**6, packed, pages - 1)
    with pytest.raises(UsageError, match=r"packed slot .* outside"):
        native(kernels).seal_value_rows(arena, slots[0], packed, slots[0] + packed.num_pages * 16 - 1)
    assert all(torch.equal(half, old) for half, old in zip(packed.halves, before, strict=True))


def test_problems_reach_what_they_should() -> None:
    """The drawn lengths contain what the tests above are about."""
    problem: PackedProblem = make_packed(SMALL["kivi"])
    sealed = problem.segment.sealed
    assert sealed is not None
    assert (sealed.value_lengths < sealed.key_lengths).any()
    assert (sealed.key_lengths == 0).any()
    assert (sealed.open_base < sealed.value_lengths).any()
