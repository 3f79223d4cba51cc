"""Spherical k-means: clusters of unit-norm rows by their cosine, the same on every worker."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from jem.errors import InputError

CHUNK = 1 << 25
"""Similarities that are computed at a time: 128 MB in float32."""


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of each row with the greatest cosine: unit-norm (n, d) and (K, d) to int64 (n,)."""
    parts = torch.split(rows, max(1, CHUNK // len(centroids)))
    return torch.cat([(part @ centroids.T).argmax(dim=1) for part in parts])


@torch.no_grad()
def spherical_kmeans(rows: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm by cosine, from random rows; a cluster that gets empty begins anew at a random row.

    Args:
        rows: unit-norm, (n, d).
        clusters: K, at most n.
        iterations: assignments that are each followed by an update of the centroids.
        generator: on the CPU; draws the same whether clusters get empty or not.

    Returns:
        Unit-norm centroids, (K, d), and which of them is each row's, int64 (n,).

    Raises:
        InputError: fewer rows than clusters.
    """
    count = len(rows)
    if count < clusters:
        raise InputError(
            f"k-means needs an image for each cluster, and has {count} for {clusters}: lower method.prototypes"
        )
    centroids = rows[torch.randperm(count, generator=generator)[:clusters].to(rows.device)]
    for _ in range(iterations):
        assigned = nearest(rows, centroids)
        again = rows[torch.randint(count, (clusters,), generator=generator).to(rows.device)]
        # sums by a product with the 0-1 matrix: adding by index has no fixed order on a GPU, and workers must agree
        sums, sizes = torch.zeros_like(centroids), torch.zeros_like(centroids[:, 0])
        step = max(1, CHUNK // clusters)
        for part, cluster in zip(torch.split(rows, step), torch.split(assigned, step), strict=True):
            member = functional.one_hot(cluster, clusters).to(rows.dtype)
            sums += member.T @ part
            sizes += member.sum(dim=0)
        centroids = functional.normalize(torch.where(sizes[:, None] > 0, sums, again), dim=1)
    return centroids, nearest(rows, centroids)
