"""BYOL: bootstrap your own latent.

Grill et al., "Bootstrap Your Own Latent: a new approach to self-supervised learning", NeurIPS 2020.

    loss = (2 - 2 cos(p, sg z'_target)) + (2 - 2 cos(p', sg z_target)),   each a mean over the batch (equation 2)
    after the optimizer's step:  target = tau target + (1 - tau) online   (equation 1)

p is the predictor's output for one view, z'_target the target network's projection of the other. The target's batch
norms take the statistics of the batch, as the online network's do, and keep running ones of their own. The projector's
last layer has no bias: the predictor's batch norm would take it out of p, so it would never be trained.

A second rule is known for the target: the online weights times a scalar, target = scale * online, after each step.
Without stop-gradient there is no target network: z and z' are the online network's, and get a gradient too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import all_reduce_mean
from jem.methods.base import Method, Progress, StepOutput, at_least_float32
from jem.models.branch import Branch
from jem.models.heads import mlp
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, BYOLConfig
    from jem.models.backbones import Backbone


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of the unit vectors, 2 - 2 cos(p, z); (N, d) each, to a scalar.

    It is the mean of the workers' own, equal parts, so no embedding need be gathered.
    """
    return 2 - 2 * functional.cosine_similarity(p, z, dim=1).mean()


class BYOL(Method):
    """Online network with a predictor, and the target network that it learns to predict."""

    config: BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.online = Branch(backbone, config.projector, last_bias=False, norm=config.norm)
        self.predictor: nn.Module = nn.Identity()
        if config.predictor is not None:
            width = config.projector[-1]
            self.predictor = mlp((width, *config.predictor, width), norm=config.norm)
        self.target = momentum_copy(self.online) if config.stop_gradient else None
        if self.target is not None and config.scale is not None:
            scaled(self.target, self.online, config.scale)

    @property
    def backbone(self) -> Backbone:
        """The online network's."""
        return self.online.backbone

    def forward(self, views: Views) -> StepOutput:
        """BYOL of two views, in both directions."""
        (y1, z1), (_, z2) = self.online.each(views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        t1, t2 = z1, z2
        if self.target is not None:
            with torch.no_grad():
                (_, t1), (_, t2) = self.target.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            p1, p2, t1, t2 = (at_least_float32(x) for x in (p1, p2, t1, t2))
            loss = all_reduce_mean(byol_loss(p1, t2) + byol_loss(p2, t1))
        return self.output(loss, (z1, z2), y1, {"distance": loss / 2})

    def after_step(self, progress: Progress) -> None:
        """Move the target."""
        if self.target is None:
            return
        if self.config.scale is not None:
            scaled(self.target, self.online, self.config.scale)
        else:
            follow(self.target, self.online, decay(self.config.momentum, progress.share))


@torch.no_grad()
def scaled(target: nn.Module, online: nn.Module, scale: float) -> None:
    """Let each parameter of `target` become that of `online` times `scale`; buffers stay, as in `follow`."""
    for ours, theirs in zip(target.parameters(), online.parameters(), strict=True):
        ours.copy_(theirs * scale)
