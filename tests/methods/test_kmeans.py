"""Spherical k-means is Lloyd's algorithm by cosine, and finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from jem.errors import InputError
from jem.methods import kmeans
from jem.methods.kmeans import nearest, spherical_kmeans


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def planted(clusters: int, each: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Rows around orthogonal directions, in random order, and which of them each row is around."""
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(clusters).repeat(each)[torch.randperm(clusters * each, generator=generator)]
    noise = torch.randn(len(member), 16, generator=generator, dtype=torch.float64)
    return functional.normalize(torch.eye(16, dtype=torch.float64)[member] + spread * noise, dim=1), member


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 25),
    d=st.integers(2, 5),
    k=st.integers(1, 25),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_it_is_lloyds_algorithm(n: int, d: int, k: int, iterations: int, seed: int) -> None:
    k = min(k, n)
    rows = unit(n, d, seed)
    drawn = generator(seed)
    centroids = rows[torch.randperm(n, generator=drawn)[:k]].numpy()
    points = rows.numpy()

    def assign() -> list[int]:
        return [int(np.argmax([float(point @ centroid) for centroid in centroids])) for point in points]

    for _ in range(iterations):
        again = torch.randint(n, (k,), generator=drawn)
        found, moved = assign(), []
        for cluster in range(k):
            members = [point for point, its in zip(points, found, strict=True) if its == cluster]
            total = sum(members) if members else points[again[cluster]]
            moved.append(total / max(np.linalg.norm(total), 1e-12))
        centroids = np.array(moved)
    result, assigned = spherical_kmeans(rows, k, iterations, generator(seed))
    np.testing.assert_allclose(result.numpy(), centroids, atol=1e-9)
    cosines = points @ result.numpy().T
    np.testing.assert_allclose(cosines[np.arange(n), assigned.numpy()], cosines.max(axis=1), atol=1e-12)
    assert assigned.dtype == torch.int64


def test_planted_clusters_are_found_by_the_best_of_a_few_starts() -> None:
    rows, member = planted(4, 30)
    tries = [spherical_kmeans(rows, 4, 10, generator(seed)) for seed in range(10)]
    centroids, assigned = max(tries, key=lambda each: (rows * each[0][each[1]]).sum().item())
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))
    for cluster in range(4):
        assert assigned[member == cluster].unique().numel() == 1
    assert assigned.unique().numel() == 4
    assert (centroids.max(dim=1).values > 0.95).all()  # each close to its direction


def test_two_clusters_are_found_from_any_start() -> None:
    rows, member = planted(2, 40)
    for seed in range(20):
        _, assigned = spherical_kmeans(rows, 2, 10, generator(seed))
        assert assigned[member == 0].unique().numel() == assigned[member == 1].unique().numel() == 1
        assert assigned.unique().numel() == 2


def test_more_iterations_are_never_worse() -> None:
    rows = unit(200, 4)
    within = []
    for iterations in range(1, 8):
        centroids, assigned = spherical_kmeans(rows, 10, iterations, generator())
        assert assigned.unique().numel() == 10  # none got empty, so no new start
        within.append((rows * centroids[assigned]).sum().item())
    assert within == sorted(within)


def test_an_empty_cluster_begins_anew_at_a_row() -> None:
    """Two rows are one and the same, so of the clusters that begin at them one gets nothing."""
    rows = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    centroids, _ = spherical_kmeans(rows, 3, 1, generator())
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert all(any(torch.equal(centroid, row) for row in rows) for centroid in centroids)


def test_parts_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit(50, 6)
    whole = spherical_kmeans(rows, 5, 4, generator())
    monkeypatch.setattr(kmeans, "CHUNK", 5 * 7)
    parts = spherical_kmeans(rows, 5, 4, generator())
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(nearest(rows, whole[0]), whole[1])


def test_more_clusters_than_rows_are_refused() -> None:
    with pytest.raises(InputError, match="has 3 for 4: lower"):
        spherical_kmeans(unit(3, 2), 4, 1, generator())
