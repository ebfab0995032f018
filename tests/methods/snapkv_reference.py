"""SnapKV's choice in plain numpy."""

import numpy as np
import numpy.typing as npt


def plain_capacity(num_prompt: int, budget: float) -> int:
    """Prompt tokens that stay, at least two."""
    return max(2, int(num_prompt * budget))


def plain_observed(num_prompt: int, budget: float, observed: int) -> int:
    """Rows that vote, and stay: at most half of what stays."""
    return min(observed, plain_capacity(num_prompt, budget) // 2)


def plain_pooled(votes: npt.NDArray[np.float32], kernel: int) -> npt.NDArray[np.float32]:
    """The most that any of `kernel` tokens around each of [T] got."""
    first = [max(0, t - kernel // 2) for t in range(len(votes))]
    last = [t - kernel // 2 + kernel for t in range(len(votes))]
    return np.array([votes[a:b].max() for a, b in zip(first, last, strict=True)])


def plain_kept(votes: npt.NDArray[np.float32], num_prompt: int, budget: float, observed: int, kernel: int) -> list[int]:
    """Positions that stay of a prompt of `num_prompt` tokens and whatever follows it, by votes [T] of its last rows."""
    capacity, rows = plain_capacity(num_prompt, budget), plain_observed(num_prompt, budget, observed)
    if num_prompt <= capacity:
        return list(range(len(votes)))
    pooled = plain_pooled(votes[: num_prompt - rows], kernel)
    best = np.argsort(-pooled, kind="stable")[: capacity - rows]
    return sorted([*best.tolist(), *range(num_prompt - rows, len(votes))])
