"""attend of every kernel family against the specification, and the specification against dense softmax."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import Kernels, Segment, available_kernels, kernels_for
from tests.kernels.cases import Case, Problem, dense, make

CPU = torch.device("cpu")
NATIVE = [name for name in available_kernels(CPU) if name != "reference"]

BASE = Case()
PREFILL = Case(queries=(70, 3, 0, 130), past=(0, 33, 4, 21), mass_rows=None)
SMALL = {
    "decode": BASE,
    "per-head": BASE.with_(per_head=True),
    "two queries": BASE.with_(queries=(2, 0, 3), past=(17, 9, 64), group=1),
    "chunk": BASE.with_(queries=(9, 0, 5), past=(20, 3, 0)),
    "window": BASE.with_(queries=(9, 1), past=(40, 70), window=13),
    "window, given positions": BASE.with_(
        queries=(9, 2), past=(30, 20), window=13, shuffled_positions=True, query_positions=True, per_head=True
    ),
    "window, query positions": BASE.with_(queries=(9, 2), past=(30, 20), window=7, query_positions=True),
    "softcap": BASE.with_(queries=(1, 6), past=(30, 20), softcap=2.5),
    "not causal": BASE.with_(queries=(1, 6), past=(30, 0), causal=False),
    "mass of last rows": BASE.with_(queries=(1, 6, 20), past=(30, 20, 3), mass_rows=(0, 2, 7)),
    "bfloat16": BASE.with_(dtype=torch.bfloat16, queries=(4, 1), past=(7, 80)),
    "float16": BASE.with_(dtype=torch.float16, queries=(4, 1), past=(7, 80)),
    "value dim": BASE.with_(key_dim=24, value_dim=40, queries=(1, 5), past=(20, 20)),
    "odd dims": BASE.with_(key_dim=20, value_dim=7, num_heads=1, group=3, queries=(1, 5), past=(20, 20)),
    "more queries than keys": BASE.with_(queries=(6, 12), past=(-2, -7), mass=False),
}


def attend(kernels: Kernels, problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse, mass; leaves the problem's own mass as it was."""
    mass = None if problem.segment.mass is None else problem.segment.mass.clone()
    segment = dataclasses.replace(problem.segment, mass=mass)
    out, lse = kernels.attend(problem.queries, problem.query_start, [segment], **problem.options)  # type: ignore[arg-type]
    assert lse is not None
    return out, lse, mass


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    for name, x, y in zip(("out", "lse", "mass"), found, wanted, strict=True):
        if y is not None:
            torch.testing.assert_close(
                x.double().flatten(),
                y.double().flatten(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("name", SMALL)
def test_reference_is_dense_softmax(name: str) -> None:
    problem = make(SMALL[name])
    assert_same(attend(kernels_for(CPU, "reference"), problem), dense(problem))


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("name", SMALL)
def test_native_equals_reference(name: str, kernels: str) -> None:
    problem = make(SMALL[name])
    assert_same(attend(kernels_for(CPU, kernels), problem), attend(kernels_for(CPU, "reference"), problem))


SHAPES = [(20, 20), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)]


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_native_head_shapes(dims: tuple[int, int], group: int, kernels: str) -> None:
    dtype = [torch.float32, torch.bfloat16, torch.float16][(dims[0] + group) % 3]
    case = Case(
        queries=(1, 1, 40, 2),
        past=(200, 3, 90, 15),
        group=group,
        key_dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
        seed=group,
    )
    problem = make(case.with_(per_head=group % 2 == 0))
    assert_same(attend(kernels_for(CPU, kernels), problem), attend(kernels_for(CPU, "reference"), problem))


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_head", [False, True])
def test_native_prefill_chunks(dtype: torch.dtype, per_head: bool, kernels: str) -> None:
    case = PREFILL.with_(dtype=dtype, per_head=per_head, mass_rows=(70, 1, 0, 50), num_heads=1, group=3)
    for window, softcap in ((None, None), (50, None), (None, 5.0)):
        problem = make(case.with_(window=window, softcap=softcap))
        assert_same(attend(kernels_for(CPU, kernels), problem), attend(kernels_for(CPU, "reference"), problem))


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("block_size", [1, 5, 64, 100])
def test_any_block_size(block_size: int, kernels: str) -> None:
    problem = make(Case(queries=(1, 30), past=(150, 99), block_size=block_size))
    assert_same(attend(kernels_for(CPU, kernels), problem), attend(kernels_for(CPU, "reference"), problem))


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("kernels", NATIVE)
def test_split_over_length_and_threads(kernels: str, threads: int) -> None:
    problem = make(Case(queries=(1, 2), past=(6000, 40), num_heads=1, group=3, key_dim=32, value_dim=32))
    wanted = attend(kernels_for(CPU, "reference"), problem)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend(kernels_for(CPU, kernels), problem)
    finally:
        torch.set_num_threads(before)
    assert_same(found, wanted)


@pytest.mark.parametrize("kernels", available_kernels(CPU))
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_segments_merge_to_one(queries: int, kernels: str) -> None:
    """A shared prefix that all queries see, and a causal rest, equal one segment."""
    problem = make(Case(queries=(queries,), past=(112,), mass=True, seed=queries))
    whole, chosen = problem.segment, kernels_for(CPU, kernels)
    joined = attend(chosen, problem)
    assert whole.mass is not None
    mass = whole.mass.clone()
    parts = [
        dataclasses.replace(
            whole,
            tables=whole.tables[:, :3],
            lengths=torch.tensor([48], dtype=torch.int32),
            causal=False,
            mass=mass,
        ),
        dataclasses.replace(whole, tables=whole.tables[:, 3:], lengths=whole.lengths - 48, mass=mass),
    ]
    out, lse = chosen.attend(problem.queries, problem.query_start, parts, **problem.options)  # type: ignore[arg-type]
    assert lse is not None
    assert_same((out, lse, mass), joined)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_rows_that_see_nothing(kernels: str) -> None:
    problem = make(Case(queries=(1, 40), past=(-1, -30), mass=False))
    out, lse, _ = attend(kernels_for(CPU, kernels), problem)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert (lse[1:31] == -torch.inf).all()
    assert torch.isfinite(lse[31:]).all()


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_rows_no_sequence_owns_are_zero(kernels: str) -> None:
    problem = make(Case(queries=(1, 2), past=(20, 20)))
    problem.queries = torch.cat([problem.queries, torch.randn(4, 4, 64)])
    out, lse, _ = attend(kernels_for(CPU, kernels), problem)
    assert (out[3:] == 0).all()
    assert (lse[3:] == -torch.inf).all()


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_extreme_logits(kernels: str) -> None:
    """One key far above all others takes everything; nothing overflows."""
    problem = make(Case(queries=(1, 30), past=(100, 100)))
    problem.queries *= 1000.0
    found = attend(kernels_for(CPU, kernels), problem)
    wanted = dense(problem)
    assert all(torch.isfinite(x).all() for x in found if x is not None)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kernels", available_kernels(CPU))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries(dtype: torch.dtype, kernels: str) -> None:
    problem = make(Case(queries=(1, 30), past=(100, 100), dtype=dtype))
    wanted = attend(
        kernels_for(CPU, "reference"), dataclasses.replace(problem, queries=problem.queries.to(dtype).float())
    )
    problem.queries = problem.queries.to(dtype)
    found = attend(kernels_for(CPU, kernels), problem)
    assert found[0].dtype == dtype
    assert_same((found[0], found[1], found[2]), wanted, 1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_mass_sums_to_rows(kernels: str) -> None:
    """Probabilities of a row sum to one, so the mass of a call is its number of counted rows and heads."""
    problem = make(Case(queries=(1, 50, 3), past=(300, 100, 17), mass_rows=(1, 20, 2)))
    assert problem.segment.mass is not None
    before = problem.segment.mass.sum()
    _, _, mass = attend(kernels_for(CPU, kernels), problem)
    assert mass is not None
    assert float(mass.sum() - before) == pytest.approx(23 * 4, rel=1e-3)


@pytest.mark.parametrize("kernels", NATIVE)
def test_strided_queries_and_tables(kernels: str) -> None:
    """Views as the engine makes them: heads first, tables cut from a wider array."""
    problem = make(Case(queries=(1, 30), past=(100, 50)))
    wanted = attend(kernels_for(CPU, "reference"), problem)
    problem.queries = problem.queries.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros(5, 99, dtype=torch.int32)
    width = problem.segment.tables.shape[1]
    wide[1:5:3, 3 : 3 + width] = problem.segment.tables
    problem.segment = dataclasses.replace(problem.segment, tables=wide[1:5:3, 3 : 3 + width])
    assert_same(attend(kernels_for(CPU, kernels), problem), wanted)


def refuse(kernels: str, problem: Problem, match: str, **changes: object) -> None:
    problem.segment = dataclasses.replace(problem.segment, **changes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=match):
        attend(kernels_for(CPU, kernels), problem)


@pytest.mark.parametrize("kernels", available_kernels(CPU))
def test_shapes_that_do_not_fit_are_refused(kernels: str) -> None:
    refuse(kernels, make(BASE), "num_kv_heads", num_kv_heads=None)
    refuse(kernels, make(BASE), "multiple of 3 KV heads", num_kv_heads=3)
    refuse(kernels, make(BASE), "do not fit 3 sequences", lengths=torch.ones(2, dtype=torch.int32))
    refuse(kernels, make(BASE), "head dim 64", keys=torch.zeros(1, 16, 32), values=torch.zeros(1, 16, 32))


@pytest.mark.parametrize("kernels", NATIVE)
def test_memory_outside_the_arena_is_never_read(kernels: str) -> None:
    problem = make(BASE)
    refuse(kernels, make(BASE), "outside the arena", page_offset=10**6)
    refuse(kernels, make(BASE), "outside the arena", tables=problem.segment.tables - 5)
    refuse(kernels, make(BASE), "its table holds", lengths=problem.segment.lengths + 100)
    problem.query_start = problem.query_start + 1
    refuse(kernels, problem, "leaves the 3 query rows")


@pytest.mark.parametrize("kernels", NATIVE)
def test_long_mass_prefill_needs_no_matrix(kernels: str) -> None:
    """8k queries over 8k keys with mass: the process grows by the output, not by 8k x 8k probabilities."""
    import resource

    if kernels == "cpu-generic" and len(NATIVE) > 1:
        pytest.skip("same code as the faster sets; only they have time for it")
    tokens = 8192
    problem = make(
        Case(
            queries=(tokens,),
            past=(0,),
            num_heads=1,
            group=1,
            key_dim=16,
            value_dim=16,
            num_layers=1,
            layer=0,
        )
    )
    chosen = kernels_for(CPU, kernels)
    attend(chosen, make(BASE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, _, mass = attend(chosen, problem)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert problem.segment.mass is not None
    assert mass is not None
    assert float(mass.sum() - problem.segment.mass.sum()) == pytest.approx(tokens, rel=1e-3)
    assert grown < tokens * tokens * 4 / 8


def test_segment_says_its_heads() -> None:
    segment = make(BASE.with_(per_head=True)).segment
    assert isinstance(segment, Segment)
    assert segment.num_heads == 2
    assert not segment.whole_blocks
