"""What the tests of models share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvwise.models import random
from kvwise.models.quiet import quiet
from kvwise.models.support import tiny_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain() -> Callable[[str], PreTrainedModel]:
    """Builds the tiny model of a type as transformers runs it, without the hook."""
    return lambda model_type: random.build(tiny_config(model_type), 0, lambda num_parameters: None)


@pytest.fixture
def save(tmp_path: Path, plain: Callable[[str], PreTrainedModel]) -> Callable[..., Path]:
    """Writes the tiny model of a type as a checkpoint folder."""

    def write(model_type: str = "llama", *, shard: str = "1GB", dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / f"{model_type}-{shard}"
        with quiet():
            plain(model_type).to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return write
