"""Mass of rows whose log-sum-exp is given: the same as attend's own, times the weight of each row."""

import itertools

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import kernels_for
from kvwise.kernels.base import Kernels, Segment

FAMILIES = ["reference", None]  # None: the machine's own
HEADS, GROUP, DIM, SIZE = 2, 3, 16, 8


def family(name: str | None) -> Kernels:
    return kernels_for(torch.device("cpu"), name)


class Case:
    """Sequences of `counts` queries over `lengths` [B, H] slots in pages of their own."""

    def __init__(self, counts: list[int], lengths: list[list[int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(map(max, lengths)) // SIZE)
        num_pages = len(counts) * HEADS * width
        self.keys, self.values = torch.randn(2, num_pages, SIZE, DIM, generator=generator)
        self.tables = torch.randperm(num_pages, generator=generator).view(len(counts), HEADS, width).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.queries = torch.randn(sum(counts), HEADS * GROUP, DIM, generator=generator)
        self.start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        self.weights = torch.rand(sum(counts), generator=generator) + 0.1

    def segment(self, *, causal: bool, mass: Tensor | None = None) -> Segment:
        return Segment(self.keys, self.values, self.tables, self.lengths, causal=causal, mass=mass)

    def column(self) -> Tensor:
        return torch.zeros(self.keys.shape[:2])


CASES = [
    ([1, 1, 1], [[20, 30], [50, 66], [3, 7]], True),  # a decode step
    ([1, 1], [[20, 0], [0, 9]], False),
    ([4], [[20, 30]], True),
    ([5, 300, 1], [[5, 9], [300, 320], [3, 7]], True),  # more rows than are handled at once
    ([2, 0, 3], [[2, 30], [5, 5], [9, 11]], False),
]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("counts", "lengths", "causal"), CASES)
def test_it_is_what_attend_adds(
    counts: list[int], lengths: list[list[int]], causal: bool, name: str | None, softcap: float | None
) -> None:
    case, kernels = Case(counts, lengths, seed=1), family(name)
    expected, found = case.column(), case.column()
    segment = case.segment(causal=causal, mass=expected)
    lse = kernels.attend(case.queries, case.start, [segment], scale=0.3, softcap=softcap, want_lse=True).lse
    assert lse is not None
    kernels.add_mass(
        case.queries, case.start, [case.segment(causal=causal, mass=found)], lse, scale=0.3, softcap=softcap
    )
    assert expected.sum() > 0
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_count_as_much_as_the_lse_says(name: str | None) -> None:
    """Twice the weight, log 2 less."""
    case, kernels = Case([7, 1], [[20, 30], [9, 12]], seed=2), family(name)
    lse = kernels.attend(case.queries, case.start, [case.segment(causal=True)], scale=0.3, want_lse=True).lse
    assert lse is not None
    expected, found = case.column(), case.column()
    for row in range(8):
        b = int(row == 7)
        one = torch.tensor([0, 1], dtype=torch.int32)
        part = case.column()
        seen = case.lengths[b : b + 1] - (6 - row if b == 0 else 0)
        alone = Segment(case.keys, case.values, case.tables[b : b + 1], seen, mass=part)
        kernels.attend(case.queries[row : row + 1], one, [alone], scale=0.3)
        expected += case.weights[row] * part
    weighed = lse - case.weights.log()[:, None]
    kernels.add_mass(case.queries, case.start, [case.segment(causal=True, mass=found)], weighed, scale=0.3)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_blocks_and_a_lse_of_another_shape_are_refused(name: str | None) -> None:
    case, kernels = Case([1], [[20, 30]], seed=3), family(name)
    lse = torch.zeros(1, HEADS * GROUP)
    whole = Segment(
        case.keys, case.values, case.tables[:, 0], case.lengths[:, 0], num_kv_heads=HEADS, mass=case.column()
    )
    with pytest.raises(UsageError, match="open pages per head"):
        kernels.add_mass(case.queries, case.start, [whole], lse, scale=0.3)
    with pytest.raises(UsageError, match="one of every query"):
        kernels.add_mass(case.queries, case.start, [case.segment(causal=True)], lse[:, :2], scale=0.3)
