"""A small cache on a virtual clock, and the two or three calls every test makes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvwise.cache.identity import Identity
from kvwise.cache.manager import CacheManager
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.core.clock import VirtualClock
from kvwise.policies.catalogue import make_policy


class Cache(CacheManager):
    """A manager with shorthands for whole life stages."""

    def start(self, tokens: Any, salt: str = "", terms: Terms = NO_LIMIT) -> int:
        """Admit and reserve a prompt; nothing is computed beyond its hit."""
        tokens = np.asarray(tokens)
        keys = self.keys(tokens, salt)
        row = self.admit(self.match(keys, len(tokens)), keys, len(tokens), terms=terms)
        assert self.reserve(row, len(tokens))
        return row

    def compute(self, row: int, num_tokens: int) -> None:
        """Commit `num_tokens` in total."""
        self.commit(np.array([row]), np.array([num_tokens]))

    def prefill(self, tokens: Any, salt: str = "", terms: Terms = NO_LIMIT) -> int:
        """Admit, reserve and compute a prompt."""
        row = self.start(tokens, salt, terms)
        self.compute(row, len(tokens))
        return row

    def found(self, tokens: Any, salt: str = "") -> int:
        """Tokens of a prompt that would be hit now."""
        return self.match(self.keys(np.asarray(tokens), salt), len(tokens)).num_tokens

    def why(self, tokens: Any, salt: str = "") -> str:
        """Reason of the miss that a prompt would meet now."""
        return self.match(self.keys(np.asarray(tokens), salt), len(tokens)).miss.reason.value

    def blocks(self, row: int) -> list[int]:
        """The row's block table."""
        return self.tables[row, : self.num_blocks[row]].tolist()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def make_cache(clock: VirtualClock) -> Callable[..., Cache]:
    """Block size 4, 2 layers x 2 heads, 10 blocks, 8 rows unless told otherwise."""

    def make(num_blocks: int = 10, max_sequences: int = 8, sharing: bool = True, **options: Any) -> Cache:
        identity = Identity(
            model="m",
            revision="r",
            dtype="float32",
            block_size=4,
            num_layers=2,
            num_kv_heads=2,
            head_dim=8,
            positions="rope",
        )
        return Cache(
            num_blocks=num_blocks,
            pages_per_block=4,
            block_size=4,
            max_sequences=max_sequences,
            max_blocks_per_sequence=num_blocks,
            sharing=sharing,
            identity=identity,
            policy=make_policy("lru", num_blocks),
            clock=clock,
            **options,
        )

    return make


@pytest.fixture
def cache(make_cache: Callable[..., Cache]) -> Cache:
    return make_cache()
