"""k-means on the keys of each head: what ClusterKV groups tokens by."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 4096  # keys compared with all centroids at once


def kmeans(keys: Tensor, num_clusters: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clusters of keys [H, T, D], each head by itself: centroids float32 [H, C, D] and each key's cluster int64 [H, T].

    ClusterKV, arXiv 2412.03213: a key belongs to the centroid with the largest cosine, a centroid is the mean of its
    keys. It begins with C keys drawn with `seed`, at the same places in all heads, and ends after `iterations` moves
    of the centroids, or when no key changes its cluster. A centroid that lost all its keys stays where it is. C is
    `num_clusters`, or T if there are fewer keys.
    """
    keys = keys.float()
    num_tokens = keys.shape[1]
    drawn = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centroids = keys[:, drawn.to(keys.device)].clone()
    labels = nearest(keys, centroids)
    for _ in range(iterations):
        counts, sums = _totals(keys, labels, centroids.shape[1])
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        moved = nearest(keys, centroids)
        if torch.equal(moved, labels):
            break
        labels = moved
    return centroids, labels


def nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """The centroid int64 [H, T] with the largest cosine for each key."""
    directions = torch.nn.functional.normalize(centroids, dim=-1).transpose(-1, -2)
    return torch.cat([(chunk @ directions).argmax(-1) for chunk in torch.split(keys, _ROWS, dim=1)], dim=1)


def _totals(keys: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """How many keys each cluster has [H, C, 1], and their sum [H, C, D]."""
    num_heads, _, dim = keys.shape
    # All heads' clusters in one row: whole keys are then added up, which is many times faster than number by number.
    cluster = (labels + torch.arange(num_heads, device=keys.device)[:, None] * num_clusters).flatten()
    counts = cluster.bincount(minlength=num_heads * num_clusters).view(num_heads, num_clusters, 1)
    sums = keys.new_zeros(num_heads * num_clusters, dim).index_add_(0, cluster, keys.flatten(0, 1))
    return counts, sums.view(num_heads, num_clusters, dim)
