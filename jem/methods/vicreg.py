"""VICReg: variance-invariance-covariance regularisation.

Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.

    loss = lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))

Paper and published code differ twice, and this follows the code, for which the weights 25, 25, 1 are: s is averaged
over the dimensions as well as over the batch (equation 5 sums over them), and v is halved (equation 6 adds the views).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.errors import InputError
from jem.methods.base import Method, StepOutput, everyones
from jem.methods.regularisers import covariance, variance
from jem.models.branch import Branch

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, VICRegConfig
    from jem.models.backbones import Backbone


def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared difference over batch and dimensions; (N, d) each, to a scalar (equation 5)."""
    return functional.mse_loss(z1, z2)


def variance_ablated(z: Tensor) -> Tensor:
    """The paper's ablation: the hinge on the variance in place of the standard deviation, mean_j max(0, 1 - Var_j).

    Its gradient vanishes where a dimension collapses, and so cannot prevent it (section 4.1).
    """
    return functional.relu(1 - z.var(dim=0)).mean()


def vicreg_loss(
    z1: Tensor, z2: Tensor, lam: float, mu: float, nu: float, hinge: Literal["std", "variance"] = "std"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, and its terms unweighted.

    Args:
        z1: embeddings of the first view, (N, d), in float32 or wider.
        z2: embeddings of the second view, (N, d).
        lam: weight of the invariance term.
        mu: weight of the variance term.
        nu: weight of the covariance term.
        hinge: what the variance term holds at 1.

    Raises:
        InputError: fewer than 2 images, whose variance is undefined.
    """
    if len(z1) < 2:
        raise InputError(
            f"VICReg needs the variance of a batch, and this one has {len(z1)} image: raise train.batch_size"
        )
    v = variance if hinge == "std" else variance_ablated
    terms = {
        "invariance": invariance(z1, z2),
        "variance": (v(z1) + v(z2)) / 2,
        "covariance": covariance(z1) + covariance(z2),
    }
    return lam * terms["invariance"] + mu * terms["variance"] + nu * terms["covariance"], terms


class VICReg(Method):
    """Two branches, which share their weights or not, and the loss on the gathered embeddings."""

    config: VICRegConfig

    def __init__(self, config: VICRegConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        match config.branches:
            case "shared":
                backbones = [backbone]
            case "separate":
                backbones = [backbone, backbone]
            case (first, second):
                backbones = [first, second]
        self.branches = nn.ModuleList(Branch(each, config.expander, last_bias=False) for each in backbones)

    @property
    def backbone(self) -> Backbone:
        """The first branch's."""
        return cast("Branch", self.branches[0]).backbone

    def forward(self, views: Views) -> StepOutput:
        """VICReg of two views."""
        if len(self.branches) == 1:
            (y1, z1), (_, z2) = cast("Branch", self.branches[0]).each(views)
        else:
            (y1, z1), (_, z2) = (branch(*view) for branch, view in zip(self.branches, views, strict=True))
        with torch.autocast(z1.device.type, enabled=False):
            config = self.config
            loss, terms = vicreg_loss(everyones(z1), everyones(z2), config.lam, config.mu, config.nu, config.hinge)
        return self.output(loss, (z1, z2), y1, terms)
