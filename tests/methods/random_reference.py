"""The choice of the random method in numpy's 32-bit arithmetic."""

import numpy as np
import numpy.typing as npt

UInt32 = npt.NDArray[np.uint32]


def mix(x: np.uint32 | UInt32) -> np.uint32 | UInt32:
    """fmix32 of MurmurHash3."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def plain_priorities(seed: int, layer: int, head: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Priorities of positions [T]."""
    with np.errstate(over="ignore"):
        start = mix(mix(mix(np.uint32(seed)) + np.uint32(layer)) + np.uint32(head))
        return mix(start + positions.astype(np.uint32) * np.uint32(0x9E3779B1)).astype(np.int64)


def plain_kept(seed: int, layer: int, head: int, num_tokens: int, capacity: int, recent: int) -> list[int]:
    """Positions kept of the first `num_tokens`, sorted."""
    if num_tokens <= capacity:
        return list(range(num_tokens))
    first_recent = num_tokens - min(recent, capacity)
    best = np.argsort(-plain_priorities(seed, layer, head, np.arange(first_recent)))
    return sorted([*best[: capacity - (num_tokens - first_recent)].tolist(), *range(first_recent, num_tokens)])
