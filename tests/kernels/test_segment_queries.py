"""Segments whose keys meet queries of their own, and rows that count less towards the mass."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import kernels_for
from kvwise.kernels.base import Attention, Kernels, Segment

FAMILIES = ["reference", None]  # None: the machine's own
HEADS, GROUP, DIM, SIZE = 2, 3, 16, 8


def family(name: str | None) -> Kernels:
    return kernels_for(torch.device("cpu"), name)


class Case:
    """Sequences of `counts` queries over three runs of keys each, of which two meet other queries."""

    def __init__(self, counts: list[int], lengths: list[list[int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.counts, self.lengths = counts, torch.tensor(lengths, dtype=torch.int32)  # [3, B]
        width = -(-max(map(max, lengths)) // SIZE)
        num_pages = 3 * len(counts) * HEADS * width
        self.keys, self.values = torch.randn(2, num_pages, SIZE, DIM, generator=generator)
        self.tables = torch.randperm(num_pages, generator=generator).view(3, len(counts), HEADS, width).int()
        self.queries = torch.randn(3, sum(counts), HEADS * GROUP, DIM, generator=generator)
        self.start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        self.fading = torch.rand(sum(counts), generator=generator)

    def attend(self, kernels: Kernels, mass: Tensor, fading: Tensor | None) -> Attention:
        segments = [
            Segment(
                self.keys, self.values, self.tables[i], self.lengths[i][:, None].repeat(1, HEADS), causal=i == 0,
                mass=mass, queries=self.queries[i] if i else None,
            )
            for i in range(3)
        ]  # fmt: skip
        return kernels.attend(
            self.queries[0], self.start, segments, scale=0.3, softcap=4.0, want_lse=True, mass_fading=fading
        )

    def attend_stacked(self, kernels: Kernels, mass: Tensor, fading: Tensor | None) -> Attention:
        """The second and third run as one stack."""
        lengths = self.lengths[..., None].repeat(1, 1, HEADS)
        alone = Segment(self.keys, self.values, self.tables[0], lengths[0], mass=mass)
        stack = Segment(
            self.keys, self.values, self.tables[1:], lengths[1:], causal=False, mass=mass, queries=self.queries[1:]
        )
        return kernels.attend(
            self.queries[0], self.start, [alone, stack], scale=0.3, softcap=4.0, want_lse=True, mass_fading=fading
        )

    def densely(self, fading: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and mass, one query at a time."""
        out, mass = torch.zeros(self.queries.shape[1:]), torch.zeros(self.keys.shape[:2])
        for b, (first, last) in enumerate(itertools.pairwise(self.start.tolist())):
            for row, head in itertools.product(range(first, last), range(HEADS * GROUP)):
                logits, slots = [], []
                for i in range(3):
                    seen = int(self.lengths[i, b]) - (last - 1 - row if i == 0 else 0)
                    index = torch.arange(max(0, seen))
                    pages = self.tables[i, b, head // GROUP][index // SIZE].long()
                    slots.append(pages * SIZE + index % SIZE)
                    keys = self.keys.view(-1, DIM)[slots[-1]]
                    logits.append(4.0 * torch.tanh(keys @ self.queries[i, row, head] * 0.3 / 4.0))
                where, weights = torch.cat(slots), torch.cat(logits).softmax(0)
                out[row, head] = weights @ self.values.view(-1, DIM)[where]
                mass.view(-1)[where] += weights * (1.0 if fading is None else (-fading[row]).exp())
        return out, mass


@pytest.mark.parametrize("faded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([1, 1, 1], [[20, 33, 1], [5, 0, 8], [64, 7, 0]]),  # a decode step
        ([1], [[150], [90], [300]]),
        ([5], [[20], [30], [9]]),
        ([30, 2, 70], [[30, 9, 80], [0, 12, 70], [5, 5, 5]]),
    ],
)
def test_one_softmax_over_keys_that_meet_different_queries(
    counts: list[int], lengths: list[list[int]], name: str | None, faded: bool
) -> None:
    case, kernels = Case(counts, lengths, seed=1), family(name)
    fading = case.fading if faded else None
    mass = torch.zeros(case.keys.shape[:2])
    found = case.attend(kernels, mass, fading)
    out, expected = case.densely(fading)
    torch.testing.assert_close(found.out, out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mass, expected, atol=2e-5, rtol=1e-4)
    stacked_mass = torch.zeros_like(mass)
    stacked = case.attend_stacked(kernels, stacked_mass, fading)
    assert torch.equal(stacked.out, found.out)
    assert torch.equal(stacked_mass, mass)


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_of_another_shape_are_refused(name: str | None) -> None:
    case = Case([2], [[20], [30], [9]], seed=2)
    case.queries = case.queries[:, :, : GROUP * HEADS]
    segment = Segment(
        case.keys, case.values, case.tables[0], case.lengths[0][:, None].repeat(1, HEADS), queries=case.queries[1, :1]
    )
    with pytest.raises(UsageError, match="must be as the call's"):
        family(name).attend(case.queries[0], case.start, [segment], scale=0.3)
    stack = Segment(case.keys, case.values, case.tables, case.lengths[..., None].repeat(1, 1, HEADS))
    for queries in (case.queries[:2], case.queries[0]):
        with pytest.raises(UsageError, match="must be as the call's"):
            family(name).attend(case.queries[0], case.start, [replace(stack, queries=queries)], scale=0.3)
