"""A recipe that trains in seconds, and learns as much."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kvwise.models.train.loop import Trainer
from kvwise.models.train.recipe import RECIPES, Recipe, Shape

MICRO = dataclasses.replace(
    RECIPES["small"],
    shape=Shape(2, 32, 2, 1, 64, 192, 256, head_dim=16),
    num_tokens=24_000,
    stages=(48, 64),
    tokens_per_step=800,
    advance_at=0.01,
    warm_up_steps=4,
)


@pytest.fixture
def micro() -> Recipe:
    return MICRO


@pytest.fixture
def trainer(tmp_path: Path, micro: Recipe) -> Trainer:
    """A training of the micro recipe that has not begun, in the folder `out`."""
    return Trainer(micro, 3, tmp_path / "out", torch.device("cpu"), half=False)
