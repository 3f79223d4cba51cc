"""The numbers against closed forms and NumPy, and the verdict on embeddings made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jem.errors import InputError, RunError
from jem.evaluate.collapse import Health, embedding_health, verdict


def noise(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    rows=st.integers(2, 40), dim=st.integers(1, 40), scale=st.sampled_from([1e-12, 1.0, 1e9]), seed=st.integers(0, 99)
)
def test_numbers_are_those_of_their_definitions(rows: int, dim: int, scale: float, seed: int) -> None:
    z = (noise(rows, dim, seed) + 0.7) * scale
    health = embedding_health(z)
    x = z.numpy()
    centred = x - x.mean(0)
    assert health.std == pytest.approx(x.std(0, ddof=1).mean())
    assert health.spread == pytest.approx(math.sqrt((centred**2).sum() / (x**2).sum()))
    for found, matrix in ((health.rankme, x), (health.rank, centred)):
        singular = np.linalg.svd(matrix, compute_uv=False)
        p = singular[singular > 1e-7 * singular.max()]
        p /= p.sum()
        assert found == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    if dim > 1:
        correlation = np.abs(np.corrcoef(x.T))[~np.eye(dim, dtype=bool)].mean()
        assert health.correlation == pytest.approx(correlation)
    assert (health.rows, health.dim) == (rows, dim)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_their_number(rank: int) -> None:
    basis = torch.linalg.qr(noise(20, 8)).Q  # 20 x 8, orthonormal columns
    health = embedding_health(basis[:, :rank] @ torch.linalg.qr(noise(30, rank, 1)).Q.T)
    assert health.rankme == pytest.approx(rank)


def test_scale_changes_the_standard_deviation_alone() -> None:
    z = noise(50, 10) + 1
    small, large = embedding_health(z * 1e-6), embedding_health(z * 1e6)
    assert large.std == pytest.approx(small.std * 1e12)
    assert (large.spread, large.rankme, large.rank, large.correlation) == pytest.approx(
        (small.spread, small.rankme, small.rank, small.correlation)
    )


def test_identical_rows_have_no_spread() -> None:
    health = embedding_health(torch.arange(5.0).repeat(30, 1))
    assert health.std == pytest.approx(0, abs=1e-12)
    assert health.spread == pytest.approx(0, abs=1e-12)
    assert health.rankme == pytest.approx(1)
    zero = embedding_health(torch.zeros(30, 5))
    assert (zero.std, zero.spread, zero.rankme, zero.rank, zero.correlation) == (0, 0, 0, 0, 0)


def test_a_dead_dimension_correlates_with_none() -> None:
    z = noise(2000, 3)
    z[:, 1] = 4.0
    z[:, 2] = z[:, 0]
    assert embedding_health(z).correlation == pytest.approx(1 / 3)


def test_correlation_of_many_dimensions_is_sampled_fairly() -> None:
    shared = noise(64, 1)
    z = torch.where(torch.arange(3000) % 2 == 0, shared, noise(64, 3000, 1))  # every second dimension is the same
    sample = np.abs(np.corrcoef(z.numpy().T))
    expected = (sample.sum() - 3000) / 3000 / 2999
    assert embedding_health(z).correlation == pytest.approx(expected, abs=0.01)


def test_half_precision_is_measured_like_single() -> None:
    z = noise(64, 32).bfloat16()
    assert embedding_health(z) == embedding_health(z.float())


def test_what_has_no_spread_to_measure_is_refused() -> None:
    for shape in ((1, 4), (0, 4), (4,), (3, 0)):
        with pytest.raises(InputError, match="no spread"):
            embedding_health(torch.ones(shape))
    with pytest.raises(RunError, match="not finite"):
        embedding_health(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


# --- verdict ----------------------------------------------------------------------------------------------------------


def says(z: torch.Tensor, *, absolute: bool = True) -> int:
    return verdict(embedding_health(z), absolute=absolute).kind


@pytest.mark.parametrize("rows", [2, 3, 8, 16, 64, 1000])
def test_noise_is_not_collapsed_however_small_the_batch(rows: int) -> None:
    for seed in range(5):
        assert says(noise(rows, 128, seed)) == 0
        assert says(noise(rows, 2, seed), absolute=False) == 0 or rows < 8


def test_one_output_for_every_image_is_type_1() -> None:
    one = noise(1, 64)
    for rows in (2, 16, 256):
        assert says(one + 0.01 * noise(rows, 64)) == 1
        assert says(one + 0.01 * noise(rows, 64), absolute=False) == 1
        assert says(torch.zeros(rows, 64)) == 1
    words = verdict(embedding_health(one + 0.01 * noise(256, 64))).words
    assert words.startswith("collapsed (complete)")
    assert "\n" not in words


def test_a_shrunken_embedding_is_type_1_only_where_the_loss_sees_the_scale() -> None:
    assert says(0.01 * noise(256, 64)) == 1
    assert says(0.01 * noise(256, 64), absolute=False) == 0


def test_dimensions_that_repeat_each_other_are_type_2() -> None:
    repeated = noise(256, 1) * torch.tensor([1.0, -1.0]).repeat(32) + 0.2 * noise(256, 64, 1)
    found = verdict(embedding_health(repeated))
    assert found.kind == 2
    assert found.words.startswith("collapsed (informational)")
    assert says(repeated[:16]) == 2
    assert says(repeated[:15]) == 0  # too few rows to tell


def test_ten_clusters_are_no_collapse() -> None:
    labels = torch.arange(500) % 10
    assert says(noise(10, 256)[labels] + 0.05 * noise(500, 256, 1)) == 0


def test_a_healthy_verdict_says_so() -> None:
    found = verdict(Health(std=0.9, spread=1.0, rankme=100, rank=99, correlation=0.1, rows=256, dim=512))
    assert (found.kind, found.words[:13]) == (0, "not collapsed")
