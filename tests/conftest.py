"""Fixtures for tests that serve: each model is built once a session, and every engine is closed."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub: no test may reach the network
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch may do at any time

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

BLOCK = 16


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small models are slower on many threads, and sums come out the same everywhere."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def load() -> Callable[[str], Any]:
    """`load("llama-tiny")`: the hooked random model of that name."""
    from kvwise.models.load import load_model

    return cache(lambda name: load_model(f"random:{name}"))


@pytest.fixture(scope="session")
def plain() -> Callable[[str], Any]:
    """`plain("llama")`: the same weights as `load("llama-tiny")` in transformers' own model."""
    from tests.engine.plain import Plain

    return cache(Plain)


@pytest.fixture
def serve(load: Callable[[str], Any]) -> Iterator[Callable[..., Any]]:
    """`serve("llama-tiny", "h2o", blocks=40, max_num_seqs=4)`: a checked engine, closed when the test ends.

    `blocks` is the size of the device pool in whole blocks without columns; `tiers` are given as text, `meter` says
    what a step costs.
    """
    from kvwise.core.config import EngineConfig
    from kvwise.core.layout import KVLayout
    from kvwise.core.tiering import parse_tier
    from kvwise.engine.engine import Engine
    from kvwise.methods.catalogue import parse

    engines = []

    def make(
        model: Any, strategy: str = "full", *, blocks: int = 256, clock: Any = None, meter: Any = None,
        tiers: Any = (), **settings: Any,
    ) -> Any:  # fmt: skip
        loaded = load(model) if isinstance(model, str) else model
        layout = KVLayout(loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, BLOCK, loaded.dtype.itemsize)
        settings.setdefault("kv_cache_memory_bytes", blocks * layout.block_bytes)
        config = EngineConfig(check=True, tiers=[parse_tier(tier) for tier in tiers], **settings)
        engines.append(Engine(loaded, parse(strategy), config, clock, meter))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
