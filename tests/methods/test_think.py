"""ThinK removes the channels with the smallest outer products of queries and keys."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.kernels.packed import Plain
from kvwise.methods.encoding.base import ChannelView, EncodingShape
from kvwise.methods.encoding.think import ThinK
from tests.methods.encoding_reference import plain_channels

SHAPE = EncodingShape(2, 3, 16, torch.float16, 16, "a model", None)


def view_of(queries: Tensor, keys: Tensor) -> ChannelView:
    """Of queries [L, H, G, W, D] and keys [L, H, T, D]."""
    return ChannelView((keys.shape[0], keys.shape[1]), lambda layer: queries[layer], lambda layer: keys[layer])


@given(
    num_tokens=st.integers(1, 60), num_rows=st.integers(1, 8), groups=st.integers(1, 3), seed=st.integers(0, 99),
    ratio=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.6, 0.9]),
)  # fmt: skip
def test_channels_equal_numpy(num_tokens: int, num_rows: int, groups: int, ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn((2, 3, groups, num_rows, 16), generator=generator)
    keys = torch.randn((2, 3, num_tokens, 16), generator=generator)
    found = ThinK(ratio).channels(view_of(queries, keys))
    assert found is not None
    assert found.shape == (2, 3, 16 - int(16 * ratio))
    assert found.dtype is torch.int64
    for layer in range(2):
        for head in range(3):
            wanted = plain_channels(queries[layer, head].numpy(), keys[layer, head].numpy(), ratio)
            assert found[layer, head].tolist() == wanted


def test_golden_mask() -> None:
    """Channel 1 has large keys that no query meets, channel 2 small ones that all do."""
    queries = torch.tensor([[1.0, 0.0, 4.0, 1.0], [1.0, 0.0, 4.0, 2.0]]).view(1, 1, 1, 2, 4)
    keys = torch.tensor([[2.0, 9.0, 1.0, 1.0], [2.0, 9.0, 1.0, 1.0], [2.0, 9.0, 1.0, 1.0]]).view(1, 1, 3, 4)
    assert ThinK(0.5).channels(view_of(queries, keys)).tolist() == [[[0, 2]]]  # worth 4, 0, 16, 2.5


def test_of_equal_channels_the_later_leave() -> None:
    ones = torch.ones((1, 1, 1, 1, 8))
    assert ThinK(0.5).channels(view_of(ones, ones[0])).tolist() == [[[0, 1, 2, 3]]]


def test_keys_are_narrower_than_values() -> None:
    made = ThinK(0.4).page_format(SHAPE)
    assert made is not None
    assert made.keys == Plain(torch.float16, 16 - 6)
    assert made.values == Plain(torch.float16, 16)
    assert made.page_tokens == SHAPE.block_size


@pytest.mark.parametrize("ratio", [0.0, 0.05])
def test_nothing_is_packed_where_no_channel_goes(ratio: float) -> None:
    assert ThinK(ratio).page_format(SHAPE) is None


def test_only_the_prompt_is_pruned_and_its_end_is_not() -> None:
    method = ThinK(recent=32)
    counts = torch.tensor([[0, 1, 31, 32, 33, 100]])
    for due in (method.keys_due, method.values_due):
        assert due(counts, settling=True).tolist() == [[0, 0, 0, 0, 1, 68]]
        assert due(counts, settling=False).tolist() == [[0] * 6]


def test_it_observes_the_last_rows() -> None:
    assert ThinK(observed=7).observed_rows == 7
    assert np.isclose(ThinK().ratio, 0.4)
