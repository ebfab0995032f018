"""KVMerger written down plainly from its description: lists and loops. See plain_run."""

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tests.methods.plain_run import Head

Sets = list[list[int]]


def plain_protected(scores: Sequence[float], capacity: int, recent: float, heavy: float) -> set[int]:
    """The latest tokens and the ones with the most attention; few enough that `capacity` tokens can be reached."""
    num_recent = max(1, min(int(capacity * recent), capacity - 1))
    num_heavy = min(int(capacity * heavy), (capacity - num_recent - 1) // 2)
    older = len(scores) - num_recent
    ranked = sorted(range(older), key=lambda t: -scores[t])
    return {*range(older, len(scores)), *ranked[:num_heavy]}


def plain_cosines(keys: Sequence[Tensor]) -> list[float]:
    """Of each key and the next."""
    return [float(a @ b / (a.norm() * b.norm())) for a, b in pairwise(keys)]


def plain_sets(cosines: Sequence[float], protected: Collection[int], epsilon: float) -> Sets:
    """Greedy, from the end: a token joins the set of the next if neither is protected and they are alike."""
    sets = [[len(cosines)]]
    for t in range(len(cosines) - 1, -1, -1):
        if t not in protected and t + 1 not in protected and cosines[t] >= epsilon:
            sets[-1].insert(0, t)
        else:
            sets.append([t])
    return sets[::-1]


def plain_epsilon(cosines: list[list[float]], protected: list[set[int]], most: int) -> tuple[float, float]:
    """The largest epsilon with which all heads together hold at most `most` tokens, and the gap to the next one."""
    tried = sorted({c for head in cosines for c in head}, reverse=True)
    for number, epsilon in enumerate(tried):
        sets = [plain_sets(c, p, epsilon) for c, p in zip(cosines, protected, strict=True)]
        if sum(map(len, sets)) <= most:
            return epsilon, epsilon - tried[number + 1] if number + 1 < len(tried) else 1.0
    raise AssertionError("no epsilon is low enough")


def plain_pivot(members: Sequence[int], scores: Sequence[float]) -> int:
    """The member with the most attention."""
    return max(members, key=lambda t: (scores[t], -t))


def plain_merge(keys: Tensor, values: Tensor, pivot: int) -> tuple[Tensor, Tensor]:
    """One set, keys and values [n, D] -> its key and value."""
    distances = [float((key - keys[pivot]).square().sum()) for key in keys]
    mean = sum(distances) / len(distances)
    g = [math.exp(-d / (2 * mean)) if d else 1.0 for d in distances]
    sigma = sum(g) / (math.sqrt(2) * len(g))
    g = [math.exp(-d / (2 * sigma**2)) for d in distances]
    w = [x / sum(g) for x in g]
    key = sum(x * k for x, k in zip(w, keys, strict=True))
    value = len(g) * sum(x * v for x, v in zip(w, values, strict=True))
    return torch.as_tensor(key), torch.as_tensor(value)


def plain_layers(num_layers: int, num_tokens: int, capacity: int) -> tuple[range, int]:
    """With two layers whole at the start and one at the end, or fewer: the others, and what they may hold."""
    for first, last in ((2, 1), (2, 0), (1, 0), (0, 0)):
        others = num_layers - first - last
        if others > 0:
            left = (num_layers * capacity - (first + last) * num_tokens) // others
            if left >= max(2, capacity / 2) or first == 0:
                return range(first, num_layers - last), left
    raise AssertionError


class PlainKVMerger:
    """The rule, with a share of the prompt, and perhaps an epsilon that merges more."""

    def __init__(self, budget: float, threshold: float = 1e9, heavy: float = 0.25, recent: float = 0.25) -> None:
        self._budget, self._threshold, self._heavy, self._recent = budget, threshold, heavy, recent
        self.margin = float("inf")

    def settle(self, layers: list[list[Head]]) -> None:
        """One epsilon for all heads of the layers that merge."""
        num_tokens = len(layers[0][0].positions)
        capacity = max(2, int(num_tokens * self._budget))
        if num_tokens <= capacity:
            return
        merging, capacity = plain_layers(len(layers), num_tokens, capacity)
        heads = [head for layer in merging for head in layers[layer]]
        cosines = [plain_cosines(head.keys) for head in heads]
        protected = [plain_protected(head.scores, capacity, self._recent, self._heavy) for head in heads]
        epsilon, gap = plain_epsilon(cosines, protected, capacity * len(heads))
        self.margin = min(self.margin, gap)
        for head, c, p in zip(heads, cosines, protected, strict=True):
            self._merge(head, plain_sets(c, p, min(epsilon, self._threshold)))

    def _merge(self, head: Head, sets: Sets) -> None:
        keys, values, scores = torch.stack(head.keys), torch.stack(head.values), head.scores
        merged = []
        for members in sets:
            pivot = plain_pivot(members, scores)
            ranked = sorted((scores[t] for t in members), reverse=True)
            self.margin = min(self.margin, ranked[0] - ranked[1] if len(ranked) > 1 else 1.0)
            merged.append((pivot, *plain_merge(keys[members], values[members], members.index(pivot)), 0.0))
        head.positions, head.keys, head.values, head.scores = (list(column) for column in zip(*merged, strict=True))

    def after(self, layers: list[list[Head]]) -> None:
        """All stay."""

    def answer(self, layer: int, query_head: int, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Attention's answer."""
        return out
