"""Barlow Twins: the cross-correlation matrix of the two views' embeddings is driven to the identity.

Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021.

    C = A'B / N,  A and B the embeddings of the two views, each dimension standardised over the global batch
    loss = scale (sum_i (1 - C_ii)² + lambda sum_{i != j} C_ij²)

The standardisation is that of the published code's batch norm: the variance with divisor N, plus an epsilon of 1e-5.
The published code sums C over the workers by a reduction that autograd does not see, so that its gradient is 1/W of the
true one (LARS hides that for weights, not for biases); here the gradient is the loss's, through the standardisation.
`scale` is 1 in the paper, 0.1 in common CIFAR settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jem.errors import InputError
from jem.methods.base import Method, StepOutput, everyones
from jem.models.branch import Branch

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, BarlowConfig
    from jem.models.backbones import Backbone

EPSILON = 1e-5
"""Added to the variance of each dimension, as batch norm's."""


def standardise(z: Tensor) -> Tensor:
    """Each dimension of z, (N, d), with mean 0 and variance var / (var + 1e-5), divisor N, over the batch."""
    return (z - z.mean(dim=0)) * torch.rsqrt(z.var(dim=0, correction=0) + EPSILON)


def correlation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal, (d,), of C = A'B / N, and the sum of the squares of all its entries; a, b: standardised, (N, d) each.

    |A'B|² is also the sum of the entries of AA' times those of BB', entry by entry, (N, N) both: they are taken for
    N <= d / 2, where they are no more work than the (d, d) matrix, and much less memory. C's rank is N - 1 at most, so
    where the views agree (a diagonal of equal c) its squares add up to c² d² / (N - 1), at least 2 c² d: half of the
    sum or more lies off the diagonal, and subtracting the diagonal costs no precision. Where they do not, the products
    may cancel: in float32 the relative error was 2e-6 for views that span orthogonal spaces, 1e-7 elsewhere.
    """
    n, d = a.shape
    if 2 * n <= d:
        return (a * b).sum(dim=0) / n, ((a @ a.T) * (b @ b.T)).sum() / n**2
    c = a.T @ b / n
    return c.diagonal(), c.square().sum()


def barlow_loss(z1: Tensor, z2: Tensor, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, and its two sums unweighted (the paper's equation 1).

    Args:
        z1: embeddings of the first view, (N, d), in float32 or wider.
        z2: embeddings of the second view, (N, d).
        lam: weight of the redundancy term.

    Raises:
        InputError: fewer than 2 images, which have no correlation.
    """
    if len(z1) < 2:
        raise InputError(
            f"Barlow Twins needs the correlation over a batch, and this one has {len(z1)} image: raise train.batch_size"
        )
    diagonal, squares = correlation(standardise(z1), standardise(z2))
    terms = {"invariance": (1 - diagonal).square().sum(), "redundancy": squares - diagonal.square().sum()}
    return terms["invariance"] + lam * terms["redundancy"], terms


class BarlowTwins(Method):
    """One network for both views, and the loss on the gathered embeddings."""

    config: BarlowConfig

    def __init__(self, config: BarlowConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        # the standardisation would take a last bias out again
        self.branch = Branch(backbone, config.projector, last_bias=False)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """Barlow Twins of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            loss, terms = barlow_loss(everyones(z1), everyones(z2), self.config.lam)
            loss = self.config.scale * loss
        return self.output(loss, (z1, z2), y1, terms)
