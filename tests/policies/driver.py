"""One cache over a policy, one content at a time, as the papers have it; and random traces to compare models on."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kvwise.policies.base import ReplacementPolicy


class Model(Protocol):
    """A policy written down naively: the content that leaves when `content` is used, if one does."""

    def access(self, content: int) -> int | None: ...


def depth_of(content: int) -> int:
    """Some are shallow, some deep: the last two digits, in steps of 1000 blocks."""
    return content % 100 * 1000


class Cache:
    """Contents in the blocks of a policy."""

    def __init__(self, policy: ReplacementPolicy, capacity: int, depth_of: Callable[[int], int] = depth_of) -> None:
        self.policy = policy
        self.depth_of = depth_of
        self.block_of: dict[int, int] = {}
        self.content_of: dict[int, int] = {}
        self.free = list(range(capacity))

    def access(self, content: int) -> int | None:
        if content in self.block_of:
            block = np.array([self.block_of[content]], np.int64)
            self.policy.hold(block)
            self.policy.touch(block)
            self.policy.offer(block)
            return None
        gone = None if self.free else self.evict()
        block = np.array([self.free.pop()], np.int64)
        self.block_of[content] = int(block[0])
        self.content_of[int(block[0])] = content
        self.policy.insert(block, np.array([content], np.uint64), np.array([self.depth_of(content)], np.int64))
        self.policy.offer(block)
        return gone

    def evict(self) -> int:
        (block,) = self.policy.victims(1).tolist()
        content = self.content_of.pop(block)
        del self.block_of[content]
        self.free.append(block)
        return content


def random_trace(seed: int, length: int = 1500) -> list[int]:
    """Skewed reuse with scans of contents that never come back, and a change of what is popular half way."""
    rng = np.random.default_rng(seed)
    trace: list[int] = []
    while len(trace) < length:
        if rng.random() < 0.03:
            trace += range(10_000 + len(trace), 10_000 + len(trace) + int(rng.integers(5, 40)))
        shift = 0 if len(trace) < length // 2 else 30
        trace += (np.minimum(rng.zipf(1.3, 20), 120) + shift).tolist()
    return trace


def assert_same_victims(make_policy: Callable[[int], ReplacementPolicy], make_model: Callable[[int], Model]) -> None:
    """Both evict the same contents in the same order, for small and larger tiers."""
    for seed, capacity in enumerate((1, 2, 5, 12, 30, 64, 100)):
        cache, model = Cache(make_policy(capacity), capacity), make_model(capacity)
        trace = random_trace(seed)
        assert [cache.access(c) for c in trace] == [model.access(c) for c in trace], f"capacity {capacity}"


def ids(blocks: Sequence[int]) -> np.ndarray:
    return np.array(blocks, np.int64)


def insert(policy: ReplacementPolicy, blocks: Sequence[int]) -> None:
    """Make `blocks` resident and offered; the content of block b has tag b."""
    policy.insert(ids(blocks), np.array(blocks, np.uint64), np.zeros(len(blocks), np.int64))
    policy.offer(ids(blocks))


def hit(policy: ReplacementPolicy, blocks: Sequence[int]) -> None:
    policy.hold(ids(blocks))
    policy.touch(ids(blocks))
    policy.offer(ids(blocks))
