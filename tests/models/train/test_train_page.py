"""The page of the built-in model names the recipes as they are."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from kvwise.models.train.recipe import RECIPES

PAGE = Path(__file__).parents[3] / "docs" / "builtin-model.md"


@pytest.mark.parametrize("size", RECIPES)
def test_the_page_names_the_recipe(size: str) -> None:
    recipe = RECIPES[size]
    shape = recipe.shape
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Qwen2ForCausalLM(shape.config()).parameters())
    row = (
        f"| `{size}` | {shape.num_layers}, {shape.hidden_size} | {parameters / 1e6:.2f} M |"
        f" {recipe.num_tokens / 1e6:.0f} M | {recipe.stages[-1]:,} |"
    )
    assert row in PAGE.read_text()
