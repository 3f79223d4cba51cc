"""W-MSE: embeddings that are whitened in sub-batches cannot collapse, and then positives are drawn together.

Ermolov, Siarohin, Sangineto, Sebe, "Whitening for Self-Supervised Representation Learning", ICML 2021.

    H = L^-1 (Z - mean),  L L' = Cov(Z) + epsilon tr(Cov Z) / d I,  for each sub-batch Z of each view
    loss = mean over positive pairs, images and partitions of 2 - 2 cos(h, h')

L is the Cholesky factor of the covariance (divisor n - 1) of a sub-batch; all views of a partition are cut alike, and
each is whitened by its own covariance. The gradient runs through the whitening, and through both views: public
re-implementations that detach one, or whiten both together, score far lower. The published code adds no epsilon by
default; here it is a share of the mean variance (1e-5), so that the scale of the embeddings does not matter, and
epsilon 0 is the paper's. Everything is in float32 or wider, whatever autocast says.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.device import put
from jem.methods.base import Method, StepOutput, everyones
from jem.models.branch import Branch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jem.batch import Views
    from jem.config import BackboneConfig, WMSEConfig
    from jem.models.backbones import Backbone


def whiten(z: Tensor, epsilon: float) -> Tensor:
    """Sub-batches with mean 0 and the identity as covariance; (..., n, d) to the same shape, n > d.

    What has no positive definite covariance (a collapsed embedding) becomes NaN, on which the loop stops.
    """
    n, d = z.shape[-2:]
    centred = z - z.mean(dim=-2, keepdim=True)
    covariance = centred.mT @ centred / (n - 1)
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    shifted = covariance + epsilon * mean * torch.eye(d, dtype=z.dtype, device=z.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)  # `cholesky` would wait for the device to see whether it failed
    factor = factor.masked_fill((failed != 0)[..., None, None], float("nan"))
    white: Tensor = torch.linalg.solve_triangular(factor, centred.mT, upper=False)
    return white.mT


def wmse_loss(embeddings: Sequence[Tensor], order: Tensor, sub_batch: int, epsilon: float) -> Tensor:
    """The loss of the whole batch, a scalar between 0 and 4.

    Args:
        embeddings: of each view, (N, d), in float32 or wider.
        order: a partition into sub-batches: a permutation of the N images, int64 (N,), or several, (P, N).
        sub_batch: how many images of `order` follow each other in a sub-batch; divides N.
        epsilon: share of the mean variance that is added to the covariance's diagonal.
    """
    # one after the other along `order`: (..., N / sub_batch, sub_batch, d)
    parts = [z[order].view(*order.shape[:-1], -1, sub_batch, z.shape[1]) for z in embeddings]
    white = [functional.normalize(whiten(part, epsilon), dim=-1) for part in parts]
    pairs = [2 - 2 * (a * b).sum(dim=-1).mean() for a, b in combinations(white, 2)]
    return torch.stack(pairs).mean()


class WMSE(Method):
    """One network for all views, and the loss on the gathered embeddings."""

    config: WMSEConfig

    def __init__(self, config: WMSEConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        # the whitening would take a last bias out again
        self.branch = Branch(backbone, config.projector, last_bias=False)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """W-MSE of all pairs of views."""
        representations, embeddings = zip(*self.branch.each(views), strict=True)
        with torch.autocast(embeddings[0].device.type, enabled=False):
            every = [everyones(z) for z in embeddings]
            config = self.config
            drawn = [torch.randperm(len(every[0]), generator=self.generator) for _ in range(config.partitions)]
            order = put(torch.stack(drawn), every[0].device)
            loss = wmse_loss(every, order, config.sub_batch, config.epsilon)
        return self.output(loss, embeddings, representations[0], {})
