"""Packed linear layers: the same products, no second copy of the weights, and nothing replaced that must not be."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvwise.models.load import load_model
from kvwise.models.packed import MIN_WEIGHTS, PackedLinear, can_pack, pack

pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")
WIDE, NARROW = (512, 256), (64, 32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, WIDE[0]), (7, WIDE[0]), (2, 3, WIDE[0]), (1, 0, WIDE[0]), (300, WIDE[0])])
@torch.inference_mode()
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(*WIDE, bias=bias)
    rows = torch.randn(shape)
    found = PackedLinear(plain.weight, plain.bias)(rows)
    torch.testing.assert_close(found, plain(rows), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_may_lie_anywhere() -> None:
    plain = nn.Linear(*WIDE)
    rows = torch.randn(5, 9, WIDE[0]).transpose(0, 1)
    torch.testing.assert_close(PackedLinear(plain.weight, plain.bias)(rows), plain(rows), rtol=1e-5, atol=1e-5)


def test_the_weight_can_be_read_back() -> None:
    plain = nn.Linear(*WIDE)
    assert torch.equal(PackedLinear(plain.weight, None).weight, plain.weight)


def test_large_layers_are_replaced_and_their_weights_let_go() -> None:
    model = nn.Sequential(nn.Linear(*WIDE), nn.Linear(*NARROW), Conv1D(WIDE[1], WIDE[0]))
    assert pack(model) == 2
    assert [type(layer) for layer in model] == [PackedLinear, nn.Linear, PackedLinear]
    assert sum(p.numel() for p in model.parameters()) < MIN_WEIGHTS


@torch.inference_mode()
def test_a_conv1d_layer_stays_what_it_was() -> None:
    plain = Conv1D(WIDE[1], WIDE[0])
    nn.init.normal_(plain.bias)
    model, rows = nn.Sequential(plain), torch.randn(3, WIDE[0])
    expected = plain(rows)
    assert pack(model) == 1
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_weight_stays_with_its_embedding() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(1024, 256), "head": nn.Linear(256, 1024, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert pack(model) == 0
    assert model["head"].weight is model["embedding"].weight


def test_other_dtypes_and_kinds_of_layer_stay() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(*WIDE, dtype=torch.bfloat16), Special(*WIDE))
    assert pack(model) == 0


def test_a_loaded_model_is_packed_and_counted_in_full() -> None:
    loaded = load_model("random:13m")
    kinds = [type(module) for module in loaded.model.modules()]
    assert kinds.count(PackedLinear) > 0
    assert loaded.weight_bytes == 4 * loaded.num_parameters > 40_000_000
