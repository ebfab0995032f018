"""The Triton kernels against the specification: on a GPU if there is one, else in Triton's interpreter."""

import dataclasses
import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install kvwise[triton])", allow_module_level=True)

from kvwise.kernels import Kernels, kernels_for
from tests.kernels.cases import Case, Problem, make
from tests.kernels.test_attend import SMALL, assert_same, attend

CPU = torch.device("cpu")
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_for(DEVICE, "triton")


def run(kernels: Kernels, problem: Problem) -> Result:
    """The kernels' answer where they run, brought back."""
    out, lse, mass = attend(kernels, problem.to(DEVICE))
    return out.cpu(), lse.cpu(), None if mass is None else mass.cpu()


@pytest.mark.parametrize("name", SMALL)
def test_triton_equals_reference(name: str, kernels: Kernels) -> None:
    problem = make(SMALL[name])
    assert_same(run(kernels, problem), attend(kernels_for(CPU, "reference"), problem))


def test_several_row_and_key_blocks(kernels: Kernels) -> None:
    problem = make(Case(queries=(50, 0, 1, 17), past=(90, 3, 130, 0), group=3, key_dim=40, value_dim=24))
    assert_same(run(kernels, problem), attend(kernels_for(CPU, "reference"), problem))


def test_half_precision_throughout(kernels: Kernels) -> None:
    problem = make(Case(queries=(3, 1), past=(40, 70), dtype=torch.float16))
    problem.queries = problem.queries.half()
    found, wanted = run(kernels, problem), attend(kernels_for(CPU, "reference"), problem)
    assert_same(found, wanted, 3e-3)


def test_segments_merge_to_one(kernels: Kernels) -> None:
    problem = make(Case(queries=(3,), past=(112,))).to(DEVICE)
    whole = problem.segment
    joined = attend(kernels, problem)
    assert whole.mass is not None
    mass = whole.mass.clone()
    prefix = torch.tensor([48], dtype=torch.int32, device=DEVICE)
    parts = [
        dataclasses.replace(whole, tables=whole.tables[:, :3], lengths=prefix, causal=False, mass=mass),
        dataclasses.replace(whole, tables=whole.tables[:, 3:], lengths=whole.lengths - 48, mass=mass),
    ]
    out, lse = kernels.attend(problem.queries, problem.query_start, parts, **problem.options)  # type: ignore[arg-type]
    assert lse is not None
    assert_same((out, lse, mass), joined)  # type: ignore[arg-type]
