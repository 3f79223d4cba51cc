"""SimSiam: simple Siamese networks.

Chen, He, "Exploring simple Siamese representation learning", CVPR 2021.

    loss = -(cos(p1, sg z2) + cos(p2, sg z1)) / 2,   a mean over the batch (equations 1 to 3)

The projector has batch norm after each layer; the last one's is without weight and bias, as in the published code (the
paper does not say). The predictor is a bottleneck without a norm at its end, and its learning rate does not decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import all_reduce_mean
from jem.methods.base import Method, StepOutput, at_least_float32
from jem.models.branch import Branch
from jem.models.heads import mlp

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jem.batch import Views
    from jem.config import BackboneConfig, SimSiamConfig
    from jem.models.backbones import Backbone


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Negative cosine similarity of predictions and the other view's projections; (N, d) each, to a scalar in [-1, 1].

    The caller detaches `z1` and `z2`. It is the mean of the workers' own, equal parts: no embedding need be gathered.
    """
    cosines = functional.cosine_similarity(p1, z2, dim=1) + functional.cosine_similarity(p2, z1, dim=1)
    return -cosines.mean() / 2


class SimSiam(Method):
    """One network and a predictor."""

    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.branch = Branch(backbone, config.projector, norm=config.norm, last_norm=config.norm)
        self.predictor: nn.Module = nn.Identity()
        if config.predictor is not None:
            width = config.projector[-1]
            self.predictor = mlp((width, config.predictor, width), norm=config.norm)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.branch.backbone

    def constant_rate(self) -> Iterable[nn.Module]:
        """The predictor (section 4.2: it should adapt to the latest representations)."""
        return (self.predictor,)

    def forward(self, views: Views) -> StepOutput:
        """SimSiam of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        with torch.autocast(z1.device.type, enabled=False):
            p1, p2, t1, t2 = (at_least_float32(x) for x in (p1, p2, z1, z2))
            if self.config.stop_gradient:
                t1, t2 = t1.detach(), t2.detach()
            loss = all_reduce_mean(simsiam_loss(p1, p2, t1, t2))
        return self.output(loss, (z1, z2), y1, {"cosine": -loss})
