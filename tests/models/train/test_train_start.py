"""The previous-token start does what its name says."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from kvwise.models.train.recipe import RECIPES
from kvwise.models.train.start import previous_token_start


def attention(recipe: str, *, started: bool) -> torch.Tensor:
    """Weights [H*G, T, T] of layer 0 on random tokens."""
    torch.manual_seed(0)
    config = RECIPES[recipe].shape.config()
    config._attn_implementation = "eager"  # the one that tells its weights
    model = Qwen2ForCausalLM(config).eval()
    if started:
        previous_token_start(model)
    tokens = torch.randint(0, config.vocab_size, (1, 96))
    with torch.inference_mode():
        return model(tokens, output_attentions=True).attentions[0][0]


def on_previous(weights: torch.Tensor) -> torch.Tensor:
    """Mean weight per head of the token before, over all tokens that have one."""
    return weights.diagonal(offset=-1, dim1=1, dim2=2).mean(-1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_group_of_heads_begins_by_looking_at_the_token_before(recipe: str) -> None:
    shape = RECIPES[recipe].shape
    group = shape.num_heads // shape.num_kv_heads
    shares = on_previous(attention(recipe, started=True))
    assert (shares[:group] > 0.9).all()
    assert (shares[group:] < 0.2).all()


def test_without_the_start_no_head_does() -> None:
    assert (on_previous(attention("small", started=False)) < 0.2).all()
