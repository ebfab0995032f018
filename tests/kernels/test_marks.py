"""Marks: a column holds who looked last at a key, wherever that key's mass reaches the bound of its head."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels import Kernels, Segment, available_kernels, kernels_for
from kvwise.kernels.base import Marks
from tests.kernels.cases import Case, Problem, make
from tests.kernels.packed_cases import PackedProblem, make_packed
from tests.kernels.test_attend import SMALL
from tests.kernels.test_sealed import SMALL as SMALL_PACKED

CPU = torch.device("cpu")
HAS_INTERPRETER = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
NAMES = [*available_kernels(CPU), *(["triton"] if HAS_INTERPRETER else [])]
OPEN = {name: case for name, case in SMALL.items() if case.mass} | {
    "prefill": Case(queries=(70, 3, 0, 130), past=(0, 33, 4, 21), mass_rows=(70, 1, 0, 50), per_head=True),
    "a page over two vectors": Case(queries=(1, 1), past=(70, 33), block_size=32, per_head=True),
    "short pages": Case(queries=(1, 1), past=(70, 33), block_size=4, per_head=True),
}


def marks_for(problem: Problem | PackedProblem) -> Marks:
    """Bounds that about half of the keys reach, another for each head; positions in no order."""
    segment, batch = problem.segment, len(problem.case.queries)
    heads = segment.num_heads
    lengths = segment.lengths if segment.lengths.ndim == 2 else segment.lengths[:, None].expand(batch, heads)
    rows = torch.tensor(problem.case.queries)[:, None] if problem.mass_rows is None else problem.mass_rows[:, None]
    mean = problem.case.group * rows.clamp(min=1) / lengths.clamp(min=1)
    return Marks(mean * torch.linspace(0.3, 0.9, batch * heads).view(batch, heads), 500 - 7.0 * torch.arange(batch))


def cells(segment: Segment, b: int, h: int) -> tuple[Tensor, Tensor]:
    """Slots of a head's tokens in the column of packed pages, and those in that of open ones."""
    length = int(segment.lengths[b] if segment.whole_blocks else segment.lengths[b, h])
    tokens, size, packed = torch.arange(max(0, length)), segment.keys.shape[1], torch.zeros(0, dtype=torch.int64)
    if segment.sealed is not None:
        sealed, long = segment.sealed, segment.sealed.arena.format.page_tokens
        first = tokens[: int(sealed.key_lengths[b, h])]
        packed = sealed.tables[b, h].long()[first // long] * long + first % long
        tokens = tokens[len(first) :] - int(sealed.open_base[b, h])
    table = segment.tables[b] * segment.page_stride + segment.page_offset + h
    pages = (table if segment.whole_blocks else segment.tables[b, h]).long()
    return packed, pages[tokens // size] * size + tokens % size


def attended(kernels: Kernels, problem: Problem | PackedProblem, segment: Segment) -> list[Tensor]:
    """The columns, open and packed, after one attend."""
    columns = [segment.mass, None if segment.sealed is None else segment.sealed.mass]
    fresh = [None if column is None else column.clone() for column in columns]
    sealed = None if segment.sealed is None else replace(segment.sealed, mass=fresh[1])
    run = replace(segment, mass=fresh[0], sealed=sealed)
    kernels.attend(problem.queries, problem.query_start, [run], **problem.options)  # type: ignore[arg-type]
    return [column for column in fresh if column is not None]


def check(kernels: Kernels, problem: Problem | PackedProblem) -> None:
    segment, marks = problem.segment, marks_for(problem)
    assert segment.mass is not None
    sealed = segment.sealed
    nothing = None if sealed is None or sealed.mass is None else replace(sealed, mass=sealed.mass * 0)
    received = attended(kernels, problem, replace(segment, mass=segment.mass * 0, sealed=nothing))
    wanted = [segment.mass.clone(), *([] if sealed is None or sealed.mass is None else [sealed.mass.clone()])]
    before = [column.clone() for column in wanted]
    for b, n in enumerate(problem.case.queries):
        for h in range(segment.num_heads if n else 0):
            packed, at = cells(segment, b, h)
            for column, mass, slots in zip(wanted, received, (at, packed), strict=False):
                reached = slots[mass.view(-1)[slots] >= marks.bound[b, h]]
                column.view(-1)[reached] = marks.position[b]
    found = attended(kernels, problem, replace(segment, marks=marks))
    assert not all(torch.equal(x, y) for x, y in zip(wanted, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kernels", NAMES)
@pytest.mark.parametrize("name", OPEN)
def test_keys_whose_mass_reaches_the_bound_are_marked(name: str, kernels: str) -> None:
    check(kernels_for(CPU, kernels), make(OPEN[name]))


@pytest.mark.parametrize("kernels", NAMES)
@pytest.mark.parametrize("name", SMALL_PACKED)
def test_packed_keys_are_marked_in_their_own_column(name: str, kernels: str) -> None:
    check(kernels_for(CPU, kernels), make_packed(SMALL_PACKED[name]))


@pytest.mark.parametrize("name", [name for name in available_kernels(CPU) if name != "reference"])
def test_keys_divided_among_threads_are_marked(name: str) -> None:
    from kvwise.kernels.cpu import CpuKernels

    check(CpuKernels(name.removeprefix("cpu-"), 4), make(Case(queries=(1, 1), past=(4000, 900), per_head=True)))


@pytest.mark.parametrize("kernels", NAMES)
def test_marks_that_do_not_fit_are_refused(kernels: str) -> None:
    problem = make(Case())
    marks = marks_for(problem)
    for wrong in (replace(marks, bound=marks.bound[:1]), replace(marks, position=marks.position[:2])):
        with pytest.raises(UsageError, match="do not fit 3 sequences, 2 KV heads"):
            attended(kernels_for(CPU, kernels), problem, replace(problem.segment, marks=wrong))
