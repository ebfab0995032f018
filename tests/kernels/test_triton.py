"""The Triton kernels against the specification, in Triton's interpreter: correctness only, on a CPU."""

import dataclasses
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install kvwise[triton])", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read by triton when the kernels are defined

from kvwise.kernels import Kernels, kernels_for
from tests.kernels.cases import Case, make
from tests.kernels.test_attend import SMALL, assert_same, attend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_for(CPU, "triton")


@pytest.mark.parametrize("name", SMALL)
def test_triton_equals_reference(name: str, kernels: Kernels) -> None:
    problem = make(SMALL[name])
    assert_same(attend(kernels, problem), attend(kernels_for(CPU, "reference"), problem))


def test_several_row_and_key_blocks(kernels: Kernels) -> None:
    problem = make(Case(queries=(50, 0, 1, 17), past=(90, 3, 130, 0), group=3, key_dim=40, value_dim=24))
    assert_same(attend(kernels, problem), attend(kernels_for(CPU, "reference"), problem))


def test_half_precision_throughout(kernels: Kernels) -> None:
    problem = make(Case(queries=(3, 1), past=(40, 70), dtype=torch.float16))
    problem.queries = problem.queries.half()
    found, wanted = attend(kernels, problem), attend(kernels_for(CPU, "reference"), problem)
    assert_same(found, wanted, 3e-3)


def test_segments_merge_to_one(kernels: Kernels) -> None:
    problem = make(Case(queries=(3,), past=(112,)))
    whole = problem.segment
    joined = attend(kernels, problem)
    assert whole.mass is not None
    mass = whole.mass.clone()
    prefix = torch.tensor([48], dtype=torch.int32)
    parts = [
        dataclasses.replace(whole, tables=whole.tables[:, :3], lengths=prefix, causal=False, mass=mass),
        dataclasses.replace(whole, tables=whole.tables[:, 3:], lengths=whole.lengths - 48, mass=mass),
    ]
    out, lse = kernels.attend(problem.queries, problem.query_start, parts, **problem.options)  # type: ignore[arg-type]
    assert lse is not None
    assert_same((out, lse, mass), joined)  # type: ignore[arg-type]
