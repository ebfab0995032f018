"""KIVI seals what its released code seals, token for token."""

import pytest
import torch

from kvwise.methods.encoding.kivi import KIVI
from tests.methods.encoding_reference import PlainKIVI

# Tokens so far -> packed keys, packed values, with residual 128 and group 32.
GOLDEN = {
    127: (0, 0), 128: (128, 0), 129: (128, 1), 130: (128, 2), 255: (128, 127), 256: (256, 128), 257: (256, 129),
    300: (256, 172),
}  # fmt: skip


def sealed(method: KIVI, num_prompt: int, last: int) -> dict[int, tuple[int, int]]:
    """By tokens so far, what lies packed."""
    counts = {}
    keys = values = 0
    for total in range(num_prompt, last + 1):
        keys += int(method.keys_due(torch.tensor([[total - keys]]), settling=total == num_prompt))
        values += int(method.values_due(torch.tensor([[total - values]]), settling=total == num_prompt))
        counts[total] = keys, values
    return counts


def test_golden_boundaries() -> None:
    found = sealed(KIVI(residual=128, group=32), 127, 300)
    assert {total: found[total] for total in GOLDEN} == GOLDEN


@pytest.mark.parametrize(("residual", "group"), [(128, 32), (32, 32), (64, 16), (96, 32)])
@pytest.mark.parametrize("num_prompt", [1, 31, 32, 127, 128, 129, 200])
def test_every_step_equals_the_two_stores(residual: int, group: int, num_prompt: int) -> None:
    plain = PlainKIVI(residual)
    plain.prefill(num_prompt)
    for total, (keys, values) in sealed(KIVI(2, group, residual), num_prompt, 300).items():
        assert plain.packed_keys == list(range(keys))
        assert plain.packed_values == list(range(values))
        assert len(plain.open_keys) == total - keys
        plain.decode()


@pytest.mark.parametrize(
    ("residual", "group", "tokens"),
    [(128, 32, 128), (32, 32, 32), (256, 32, 128), (96, 32, 96), (320, 64, 64), (512, 256, 256)],
)
def test_a_page_is_whole_groups_and_divides_the_residual(residual: int, group: int, tokens: int) -> None:
    assert KIVI(2, group, residual).page_tokens == tokens


def test_nothing_is_sealed_below_the_residual() -> None:
    assert set(sealed(KIVI(residual=320, group=32), 100, 319).values()) == {(0, 0)}
