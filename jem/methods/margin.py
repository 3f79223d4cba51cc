"""Margin (hinge) contrastive loss: positives are drawn together, negatives pushed a margin apart.

Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, equation 4.

    loss = mean over positive pairs of D² / 2 + mean over negative pairs of max(0, m - D)² / 2,  D = |z - z'|

The two views of an image are a positive pair, any views of two images in the global batch a negative one. The paper
sums over a given list of pairs; here there are 2 N - 2 negatives for each positive, so each kind has its own mean. The
paper's embeddings are as long as they like (`normalise: false`); of length 1 by default, m means the same in every
width of embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.methods.base import Method, StepOutput, everyones
from jem.methods.triplet import of_other_images, squared_distances
from jem.models.branch import Branch

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, MarginConfig
    from jem.models.backbones import Backbone

EPSILON = 1e-12
"""Added to D² before its root, whose slope at 0 is infinite."""


def margin_loss(z1: Tensor, z2: Tensor, margin: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, and its two means.

    Args:
        z1: embeddings of the first view, (N, d), in float32 or wider; N at least 2.
        z2: embeddings of the second view, (N, d).
        margin: m, in the unit of the embeddings.
    """
    z = torch.cat([z1, z2])
    apart = of_other_images(squared_distances(z))
    terms = {
        "positive": (z1 - z2).square().sum(dim=1).mean() / 2,
        "negative": functional.relu(margin - torch.sqrt(apart + EPSILON)).square().mean() / 2,
    }
    return terms["positive"] + terms["negative"], terms


class Margin(Method):
    """One network for both views, and the loss on the gathered embeddings."""

    config: MarginConfig

    def __init__(self, config: MarginConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        # distances are blind to a shift of all embeddings, directions are not
        self.branch = Branch(backbone, config.projector, last_bias=config.normalise)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """Margin loss of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            every = [everyones(z) for z in (z1, z2)]
            if self.config.normalise:
                every = [functional.normalize(z, dim=1) for z in every]
            loss, terms = margin_loss(every[0], every[1], self.config.margin)
        return self.output(loss, (z1, z2), y1, terms)
