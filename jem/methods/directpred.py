"""DirectPred: a linear predictor that is set from the statistics of its inputs, not learned.

Tian, Chen, Ganguli, "Understanding self-supervised learning dynamics without contrastive pairs", ICML 2021.

    F = rho F + (1 - rho) mean(z z^T),  over both views of the global batch (equation 19; rho 0.3 weighs the *old* F)
    F = U diag(s) U^T,   W = U diag(sqrt(s / max s) + eps) U^T,   p = W z

with the loss of BYOL, and BYOL's target network or, without momentum, the online network itself (stopped, as in
SimSiam). The first batch's correlation is the first F. The correlation is not centred. Equation 18 has sqrt(s) + eps
max s, which changes with the scale of z; the published code divides s by its maximum first, and this follows the code,
for which eps 0.01 is. W is set after the optimizer's step, for the next one; the first step has W = I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from jem.distributed import all_reduce_mean
from jem.methods.base import Method, Progress, StepOutput, at_least_float32
from jem.methods.byol import byol_loss
from jem.models.branch import Branch
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, DirectPredConfig
    from jem.models.backbones import Backbone


def closed_form(correlation: Tensor, eps: float) -> Tensor:
    """W = U diag(sqrt(s / max s) + eps) U^T of F = U diag(s) U^T; symmetric (d, d) to symmetric (d, d).

    Eigenvalues that rounding made negative count as 0. An F of zeros gives W = eps I.
    """
    s, u = torch.linalg.eigh(correlation)
    s = s.clamp(min=0)
    root = (s / s.max().clamp(min=torch.finfo(s.dtype).tiny)).sqrt() + eps
    return cast("Tensor", (u * root) @ u.T)


class DirectPred(Method):
    """Online network, target network and the matrix between them."""

    config: DirectPredConfig
    predictor: Tensor
    """W, (d, d), symmetric."""
    correlation: Tensor
    """F, (d, d)."""
    started: Tensor
    """bool scalar, whether F has seen a batch."""

    def __init__(self, config: DirectPredConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.online = Branch(backbone, config.projector, norm=config.norm)
        self.target = momentum_copy(self.online) if config.momentum is not None else None
        width = config.projector[-1]
        self.register_buffer("predictor", torch.eye(width))
        self.register_buffer("correlation", torch.zeros(width, width))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._correlations: list[Tensor] = []

    @property
    def backbone(self) -> Backbone:
        """The online network's."""
        return self.online.backbone

    def forward(self, views: Views) -> StepOutput:
        """BYOL's loss with p = W z, in both directions."""
        (y1, z1), (_, z2) = self.online.each(views)
        t1, t2 = z1.detach(), z2.detach()
        if self.target is not None:
            with torch.no_grad():
                (_, t1), (_, t2) = self.target.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            w1, w2, t1, t2 = (at_least_float32(x) for x in (z1, z2, t1, t2))
            both = torch.cat([w1, w2]).detach()
            self._correlations.append(both.T @ both / len(both))
            p1, p2 = (functional.linear(z, self.predictor) for z in (w1, w2))
            loss = all_reduce_mean(byol_loss(p1, t2) + byol_loss(p2, t1))
        return self.output(loss, (z1, z2), y1, {"distance": loss / 2})

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Update the correlation, set the predictor and move the target."""
        config = self.config
        batch = all_reduce_mean(torch.stack(self._correlations).mean(dim=0))
        self._correlations.clear()
        rho = self.started.to(batch.dtype) * config.rho
        self.correlation.copy_(rho * self.correlation + (1 - rho) * batch)
        self.started.fill_(True)
        if progress.step % config.every == 0:
            self.predictor.copy_(closed_form(self.correlation, config.eps))
        if self.target is not None and config.momentum is not None:
            follow(self.target, self.online, decay(config.momentum, progress.share))
