"""Is an embedding collapsed? Numbers that need no labels, and a verdict in words.

Type 1, complete collapse: every image gets one and the same output. Type 2, informational collapse: the outputs vary,
but in a few directions only; the dimensions repeat each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jem.errors import InputError, RunError

_CORRELATED = 1024
"""Dimensions, at most, whose pairwise correlations are taken: 8192 would cost 34 GFLOP at 256 rows."""

# Seen in VICReg's first 40 to 130 steps on digits and CIFAR-10 (ResNet-18; AdamW, LARS and SGD; batches of 16 to 256,
# expanders of 512 to 2048). An untouched expander begins at a standard deviation of 0.34, by PyTorch's initialisation.
STD = 0.1
"""Type 1 below it: the default dips to 0.19 in its first epochs and rises; with mu = 0 it falls below 0.1 and to 0."""
SPREAD = 0.03
"""Type 1 below it, whatever the scale: the default's embedding never went below 0.43, nor did the representation of an
untrained backbone in evaluation mode go below 0.19."""
CORRELATION = 0.8
"""Type 2 above it: the default stays under 0.5, even at 16 rows; with nu = 0 it passes 0.8 within 25 steps, up to 0.99.

The rank would be the worse judge: it is bounded by the rows, and the first steps of the default have a third of them.
"""
ROWS = 16
"""Fewer say nothing about type 2: two rows correlate by 1, and noise at N rows by 0.8 / sqrt(N)."""


@dataclass(frozen=True)
class Health:
    """How an embedding z, (N, d), is spread out."""

    std: float
    """Standard deviation of each dimension, averaged over the dimensions; the unit is that of z (VICReg aims at 1)."""
    spread: float
    """sqrt(trace(Cov z) / mean |z|^2), in [0, 1] for any scale of z: 0 if all rows are one, 1 if their mean is 0."""
    rankme: float
    """RankMe: exp of the entropy of the normalised singular values of z, between 1 and min(N, d)."""
    rank: float
    """The same of the centred z, between 1 and min(N - 1, d): directions in which the rows differ from each other."""
    correlation: float
    """Mean absolute correlation between two dimensions, in [0, 1]; noise alone gives about 0.8 / sqrt(N)."""
    rows: int
    """N."""
    dim: int
    """d."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers mean."""

    kind: Literal[0, 1, 2]
    """0: not collapsed; 1: complete collapse; 2: informational collapse."""
    words: str
    """One line for the terminal and the run's tags."""


def embedding_health(z: Tensor) -> Health:
    """Measure how the rows of `z` are spread out.

    RankMe is that of Garrido, Balestriero, Najman, LeCun, "RankMe" (2023), equation 1, without the small constant that
    it adds to each share. Everything is computed in float64.

    Args:
        z: float (N, d), embeddings or representations of N different images, N at least 2.

    Raises:
        InputError: fewer than 2 rows, or not a matrix.
        RunError: a value is not finite.
    """
    if z.ndim != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise InputError(f"an embedding of shape {tuple(z.shape)} has no spread: give (N, d) with N of 2 or more")
    z = z.detach().double()
    if not bool(torch.isfinite(z).all()):
        raise RunError("the embedding is not finite: training has diverged")
    n, d = z.shape
    # Any scale is as good, and this one keeps the squares of very small or very large values in range.
    scale = float(z.abs().max())
    if scale == 0:
        return Health(std=0.0, spread=0.0, rankme=0.0, rank=0.0, correlation=0.0, rows=n, dim=d)
    z = z / scale
    centred = z - z.mean(dim=0)
    variance = centred.square().sum(dim=0) / (n - 1)
    total = float(centred.square().sum() / z.square().sum())
    return Health(
        std=float(variance.sqrt().mean()) * scale,
        spread=min(1.0, total) ** 0.5,
        rankme=_effective_rank(z),
        rank=_effective_rank(centred),
        correlation=_mean_correlation(centred),
        rows=n,
        dim=d,
    )


def verdict(health: Health, *, absolute: bool = True) -> Verdict:
    """Say whether an embedding is collapsed, and how.

    Args:
        health: of the embedding that the loss is computed on.
        absolute: the loss holds the embedding to a scale, a standard deviation of 1 in each dimension as VICReg does.
            False for embeddings that are normalised before they are compared, and for representations: then only
            what does not depend on the scale counts.
    """
    if absolute and health.std < STD:
        return Verdict(
            1,
            f"collapsed (complete): the standard deviation per dimension is {health.std:.2g}, under {STD:g}: "
            "all images get nearly the same embedding",
        )
    if health.spread < SPREAD:
        return Verdict(
            1,
            f"collapsed (complete): the spread is {health.spread:.2g} of the embedding's length, under {SPREAD:g}: "
            "all images get nearly the same embedding",
        )
    if health.rows >= ROWS and health.dim > 1 and health.correlation > CORRELATION:
        return Verdict(
            2,
            f"collapsed (informational): dimensions correlate by {health.correlation:.2f} on average, over "
            f"{CORRELATION:g}, and the rank is {health.rank:.0f} of {min(health.rows - 1, health.dim)}: "
            "they repeat each other",
        )
    return Verdict(
        0,
        f"not collapsed: standard deviation {health.std:.2g}, RankMe {health.rankme:.0f} of "
        f"{min(health.rows, health.dim)}, correlation {health.correlation:.2f}",
    )


def _effective_rank(z: Tensor) -> float:
    """Return exp(entropy) of the normalised singular values, 0.0 for a matrix of zeros."""
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    # The square root halves the digits: singular values under 1e-8 of the largest are noise, and are left out.
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    eigenvalues = eigenvalues.where(eigenvalues > eigenvalues.max() * 1e-15, 0)
    total = eigenvalues.sqrt().sum()
    if float(total) == 0:
        return 0.0
    share = eigenvalues.sqrt() / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def _mean_correlation(centred: Tensor) -> float:
    """Return the mean |correlation| over pairs of dimensions; a constant dimension correlates with none."""
    d = min(centred.shape[1], _CORRELATED)
    if d < 2:
        return 0.0
    columns = torch.linspace(0, centred.shape[1] - 1, d, device=centred.device).round().long()
    chosen = centred[:, columns]
    norm = chosen.norm(dim=0)
    constant = norm <= 1e-12
    chosen = chosen / norm.where(~constant, 1.0)
    chosen[:, constant] = 0
    correlation = (chosen.T @ chosen).abs()
    return float((correlation.sum() - correlation.diagonal().sum()) / (d * (d - 1)))
