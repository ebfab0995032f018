"""attend over packed pages: the reference against explicit loops, native families against the reference."""

import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.kernels import available_kernels, kernels_for
from kvwise.kernels.packed import Codes, Float8, PageFormat, Plain
from tests.kernels.packed_cases import PackedCase, dense_packed, make_packed, run

CPU = torch.device("cpu")

KIVI = PageFormat(Codes(2, "channel", 32), Codes(2, "token", 32), page_tokens=64, head_dim=64)
THINK = PageFormat(Plain(torch.float16, 40), Plain(torch.float16, 64), page_tokens=16, head_dim=64)
QUANTSPEC = PageFormat(Codes(8, "channel", 64, split=True), Codes(8, "token", 64, split=True), 64, 64)

SMALL = {
    "kivi": PackedCase(KIVI, values_behind=40),
    "kivi, several queries": PackedCase(KIVI, queries=(3, 1, 5), packed_pages=(2, 1, 3), values_behind=40, seed=1),
    "kivi, prefill": PackedCase(KIVI, queries=(30, 0, 9), packed_pages=(2, 1, 3), values_behind=100, seed=2),
    "think": PackedCase(THINK, packed_pages=(4, 0, 9), seed=3),
    "think, prefill": PackedCase(THINK, queries=(17, 2, 20), packed_pages=(4, 0, 9), seed=4),
    "quantspec target": PackedCase(QUANTSPEC, queries=(4, 1), packed_pages=(2, 3), seed=5),
    "quantspec draft": PackedCase(QUANTSPEC, packed_pages=(2, 3, 1), upper_only=True, seed=6),
    "float8": PackedCase(PageFormat(Float8(), Float8(), 16, 64), packed_pages=(4, 3, 1), seed=7),
    "mixed parts": PackedCase(PageFormat(Float8(), Codes(5, "token", 64), 32, 64), values_behind=33, seed=8),
    "window": PackedCase(KIVI, window=50, queries=(2, 1, 9), packed_pages=(2, 2, 1), values_behind=9, seed=9),
    "window, positions": PackedCase(KIVI, window=50, positions=True, queries=(2, 1, 9), values_behind=9, seed=10),
    "softcap": PackedCase(KIVI, softcap=1.5, seed=11),
    "not causal": PackedCase(KIVI, queries=(2, 2, 2), causal=False, seed=12),
    "mass of last rows": PackedCase(KIVI, queries=(2, 20, 3), mass_rows=(1, 4, 0), values_behind=5, seed=13),
}


@pytest.mark.parametrize("name", SMALL)
def test_reference_is_dense_softmax(name: str) -> None:
    problem = make_packed(SMALL[name])
    for found, wanted in zip(run(kernels_for(CPU, "reference"), problem), dense_packed(problem), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    import dataclasses

    problem = make_packed(SMALL["think"])
    sealed = problem.segment.sealed
    assert sealed is not None
    for match, changes in (
        ("pass key_channels=", {"key_channels": None}),
        ("do not fit sequences", {"key_lengths": sealed.key_lengths[:1]}),
    ):
        broken = dataclasses.replace(problem.segment, sealed=dataclasses.replace(sealed, **changes))
        for kernels in available_kernels(CPU):
            with pytest.raises(UsageError, match=match):
                kernels_for(CPU, kernels).attend(problem.queries, problem.query_start, [broken], scale=1.0)
