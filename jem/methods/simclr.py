"""SimCLR: a simple framework for contrastive learning of visual representations.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
The loss is NT-Xent (equation 1), over the 2N views z_i of N images, of which z_j shows the same image as z_i:

    loss = mean_i -log(exp(sim(z_i, z_j) / T) / sum_{k != i} exp(sim(z_i, z_k) / T))

The projector's hidden layers have batch norm, as in the published code; the paper does not mention it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.methods.base import Method, StepOutput, everyones
from jem.methods.infonce import info_nce
from jem.models.branch import Branch

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, SimCLRConfig
    from jem.models.backbones import Backbone


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, and its terms.

    Args:
        z1: embeddings of the first view, (N, d), of any norm, in float32 or wider.
        z2: embeddings of the second view, (N, d).
        temperature: T.
    """
    z = functional.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(z), device=z.device).roll(len(z1))
    attraction, repulsion = info_nce(logits, positives)
    return attraction + repulsion, {"attraction": attraction, "repulsion": repulsion}


class SimCLR(Method):
    """One branch for both views. With `train.accumulate` the negatives are those of a part of the batch."""

    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.branch = Branch(backbone, config.projector)

    @property
    def backbone(self) -> Backbone:
        """The branch's."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """NT-Xent of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            loss, terms = nt_xent(everyones(z1), everyones(z2), self.config.temperature)
        return self.output(loss, (z1, z2), y1, terms)
