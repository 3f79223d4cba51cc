"""VICReg's variance and covariance terms, which any method may add to its loss.

Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def variance(z: Tensor) -> Tensor:
    """Hinge on the standard deviation of each dimension, (N, d) to a scalar (equations 1 and 2).

    mean_j max(0, 1 - sqrt(Var_j + 1e-4)), with the unbiased variance.
    """
    return functional.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the covariance matrix, / d; (N, d) to a scalar (equations 3 and 4).

    The sum over all entries is |Z'Z|² = |ZZ'|² (Z centred), so the smaller of the two matrices will do. The (N, N) one
    is taken for N <= d / 2 only: then at least half of the sum lies off the diagonal (of N - 1 dimensions at most
    are independent), and subtracting the diagonal costs no precision.
    """
    n, d = z.shape
    z = z - z.mean(dim=0)
    if 2 * n <= d:
        total = (z @ z.T).square().sum()
        return (total - z.square().sum(dim=0).square().sum()) / (n - 1) ** 2 / d
    entries = (z.T @ z).square()
    return (entries.sum() - entries.diagonal().sum()) / (n - 1) ** 2 / d
