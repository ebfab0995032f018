"""Tokens that have left: every kernel family folds and merges as the reference does, whatever the shape."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import available_kernels, kernels_for
from kvwise.kernels.cpu import CpuKernels, instruction_sets
from kvwise.kernels.folded import FoldedStates, Maps

CPU = torch.device("cpu")
NATIVE = [name for name in available_kernels(CPU) if name != "reference"]
REFERENCE = kernels_for(CPU, "reference")
# rows, layers, KV heads, query heads of each, head dim, hidden, rank
SHAPES = [
    (3, 2, 2, 2, 6, 10, 8),
    (12, 3, 4, 3, 64, 64, 8),
    (5, 1, 1, 1, 16, 7, 3),
    (20, 2, 3, 1, 33, 40, 17),
    (2, 2, 1, 4, 128, 512, 16),
    (1, 1, 2, 2, 1, 1, 1),
]


def states_of(shape: tuple[int, ...]) -> FoldedStates:
    """Nothing has left; maps whose features are neither next to nothing nor very large."""
    rows, layers, heads, group, dim, hidden, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 2 / size[-2] ** 0.5

    maps = Maps(
        draw(layers, heads * group, dim, hidden), draw(layers, heads * group, hidden, rank),
        draw(layers, heads, dim, hidden), draw(layers, heads, hidden, rank),
        *(torch.randn(layers, heads, *size, rank, generator=generator) for size in ((1,), (rank,), (1,))),
    )  # fmt: skip
    return FoldedStates(torch.zeros(rows, layers, heads, rank, dim), torch.zeros(rows, layers, heads, rank), maps)


def leavers(states: FoldedStates, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Rows, layers and heads, of which some repeat, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randint(bound, (count,), generator=generator) for bound in states.weights.shape[:3]]
    return *places, *torch.randn(2, count, states.values.shape[-1], generator=generator)


def asked(states: FoldedStates, rows: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, queries, what they found, and lse."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, *states.maps.query_in.shape[1:3])
    queries, out = torch.randn(2, *shape, generator=generator)
    order = torch.randperm(states.weights.shape[0], generator=generator)[:rows]
    return order, queries, out, torch.randn(shape[:2], generator=generator) + shift


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 50, 700])
def test_folding_equals_the_reference(name: str, shape: tuple[int, ...], count: int) -> None:
    ours, theirs = states_of(shape), states_of(shape)
    for seed in range(2):
        kernels_for(CPU, name).fold(ours, *leavers(ours, count, seed))
        REFERENCE.fold(theirs, *leavers(theirs, count, seed))
    atol = 1e-5 + 1e-6 * count  # of sums whose terms are about 1
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=atol)
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-4, atol=atol)
    kernels_for(CPU, name).fold(ours, *leavers(ours, 0))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [-60.0, 0.0, 60.0])
def test_merging_equals_the_reference(name: str, shape: tuple[int, ...], shift: float) -> None:
    states = states_of(shape)
    REFERENCE.fold(states, *leavers(states, 200))
    for rows in {1, shape[0]}:
        for layer in range(shape[1]):
            given = asked(states, rows, shift)
            expected = REFERENCE.merge_folded(states, layer, *given)
            merged = kernels_for(CPU, name).merge_folded(states, layer, *given)
            torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
            assert shift != 0.0 or rows < shape[0] or not torch.equal(merged, given[2])


@pytest.mark.parametrize("name", available_kernels(CPU))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_nothing_has_left_no_bit_changes(name: str, dtype: torch.dtype) -> None:
    states = states_of(SHAPES[0])
    kernels = kernels_for(CPU, name)
    kernels.fold(states, torch.tensor([2]), torch.tensor([1]), torch.tensor([0]), *torch.ones(2, 1, 6))
    rows, queries, out, _ = asked(states, 3)
    lse = torch.tensor([[0.0, 90.0, -90.0, -torch.inf]]).expand(3, -1)
    merged = kernels.merge_folded(states, 1, rows, queries.to(dtype), out.to(dtype), lse)
    assert merged.dtype is dtype
    changed = (merged != out.to(dtype)).any(-1)
    assert not bool(changed[rows != 2].any())
    assert not bool(changed[:, 2:].any())  # the other KV head's
    assert bool(changed[rows == 2][0, 0])


@pytest.mark.parametrize("name", NATIVE)
def test_queries_may_lie_anywhere_and_round(name: str) -> None:
    states = states_of(SHAPES[1])
    REFERENCE.fold(states, *leavers(states, 200))
    rows, queries, out, lse = asked(states, 5)
    kernels = kernels_for(CPU, name)
    expected = kernels.merge_folded(states, 1, rows, queries, out, lse)
    heads_first = queries.transpose(0, 1).contiguous().transpose(0, 1)
    dims_first = queries.transpose(1, 2).contiguous().transpose(1, 2)
    for lying in (heads_first, dims_first):
        assert torch.equal(kernels.merge_folded(states, 1, rows, lying, out, lse), expected)
    half = REFERENCE.merge_folded(states, 1, rows, queries.bfloat16(), out.bfloat16(), lse)
    found = kernels.merge_folded(states, 1, rows, queries.bfloat16(), out.bfloat16(), lse)
    torch.testing.assert_close(found.float(), half.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", instruction_sets())
def test_results_depend_on_neither_threads_nor_company(name: str) -> None:
    """A row alone answers as among others; tokens that leave one by one add up as all at once."""
    shape = SHAPES[1]
    one, many, single = CpuKernels(name, 1), CpuKernels(name, 3), states_of(shape)
    at_once = [states_of(shape) for _ in range(2)]
    tokens = leavers(single, 600)
    one.fold(at_once[0], *tokens)
    many.fold(at_once[1], *tokens)
    for i in range(600):
        one.fold(single, *(part[i : i + 1] for part in tokens))
    for states in (at_once[1], single):
        assert torch.equal(states.values, at_once[0].values)
        assert torch.equal(states.weights, at_once[0].weights)
    rows, queries, out, lse = asked(single, 12)
    together = one.merge_folded(single, 2, rows, queries, out, lse)
    assert torch.equal(many.merge_folded(single, 2, rows, queries, out, lse), together)
    for b in range(12):
        mine = slice(b, b + 1)
        assert torch.equal(one.merge_folded(single, 2, rows[mine], queries[mine], out[mine], lse[mine])[0], together[b])


@pytest.mark.parametrize("name", NATIVE)
def test_what_lies_outside_is_refused(name: str) -> None:
    states, kernels = states_of(SHAPES[0]), kernels_for(CPU, name)
    for which, what in enumerate(("request", "layer", "head")):
        for number in (-1, states.weights.shape[which]):
            tokens = leavers(states, 4)
            tokens[which][2] = number
            with pytest.raises(UsageError, match=f"{what} {number} is not one of"):
                kernels.fold(states, *tokens)
    assert float(states.weights.sum()) == 0
    rows, queries, out, lse = asked(states, 2)
    with pytest.raises(UsageError, match=r"request [34] is not one of the 3"):
        kernels.merge_folded(states, 0, rows + 2, queries, out, lse)
    with pytest.raises(UsageError, match="layer 2 is not one of the 2"):
        kernels.merge_folded(states, 2, rows, queries, out, lse)
    with pytest.raises(UsageError, match="must be"):
        kernels.merge_folded(states, 0, rows, queries[:, :2], out, lse)
    with pytest.raises(UsageError, match="must be"):
        kernels.fold(states, *leavers(states, 4)[:4], torch.zeros(4, 5))


def test_states_and_maps_must_fit() -> None:
    states = states_of(SHAPES[0])
    with pytest.raises(UsageError, match=r"values .* must be float32 \(3, 2, 2, 8, 6\)"):
        replace(states, values=states.values[..., :5])
    with pytest.raises(UsageError, match="scale"):
        replace(states, maps=replace(states.maps, scale=states.maps.scale.double()))
    with pytest.raises(UsageError, match="key_in"):
        replace(states, maps=replace(states.maps, key_in=states.maps.key_in.transpose(0, 1)))
    crossed = states.maps.key_in.transpose(2, 3).contiguous().transpose(2, 3)  # the right shape, but not as it lies
    with pytest.raises(UsageError, match="key_in"):
        replace(states, maps=replace(states.maps, key_in=crossed))
