"""VICReg: variance-invariance-covariance regularisation.

Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.

    loss = lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))

Paper and published code differ twice, and this follows the code, for which the weights 25, 25, 1 are: s is averaged
over the dimensions as well as over the batch (equation 5 sums over them), and v is halved (equation 6 adds the views).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import gather
from jem.errors import InputError
from jem.methods.base import Method, StepOutput, at_least_float32
from jem.models.backbones import Backbone, build_backbone
from jem.models.heads import mlp

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, VICRegConfig


def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared difference over batch and dimensions; (N, d) each, to a scalar (equation 5)."""
    return functional.mse_loss(z1, z2)


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


def vicreg_loss(z1: Tensor, z2: Tensor, lam: float, mu: float, nu: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, and its terms unweighted.

    Args:
        z1: embeddings of the first view, (N, d), in float32 or wider.
        z2: embeddings of the second view, (N, d).
        lam: weight of the invariance term.
        mu: weight of the variance term.
        nu: weight of the covariance term.

    Raises:
        InputError: fewer than 2 images, whose variance is undefined.
    """
    if len(z1) < 2:
        raise InputError(
            f"VICReg needs the variance of a batch, and this one has {len(z1)} image: raise train.batch_size"
        )
    terms = {
        "invariance": invariance(z1, z2),
        "variance": (variance(z1) + variance(z2)) / 2,
        "covariance": covariance(z1) + covariance(z2),
    }
    return lam * terms["invariance"] + mu * terms["variance"] + nu * terms["covariance"], terms


class Branch(nn.Module):
    """Backbone and expander: images, float (N, 3, H, W), to representation (N, D) and embedding (N, d)."""

    def __init__(self, backbone: BackboneConfig, expander: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.expander = mlp((self.backbone.dim, *expander), last_bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Representation (N, D) and embedding (N, d) of one view."""
        representation = self.backbone(images)
        return representation, self.expander(representation)


class VICReg(Method):
    """Two branches, which share their weights or not, and the loss on the gathered embeddings."""

    def __init__(self, config: VICRegConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        match config.branches:
            case "shared":
                backbones = [backbone]
            case "separate":
                backbones = [backbone, backbone]
            case (first, second):
                backbones = [first, second]
        self.branches = nn.ModuleList(Branch(each, config.expander) for each in backbones)

    @property
    def backbone(self) -> Backbone:
        """The first branch's."""
        backbone = self.branches[0].backbone
        assert isinstance(backbone, Backbone)
        return backbone

    def forward(self, views: Views) -> StepOutput:
        """VICReg of two views."""
        first, second = views.views
        y1, z1 = self.branches[0](first)
        _, z2 = self.branches[-1](second)
        with torch.autocast(z1.device.type, enabled=False):
            config = self.config
            z1, z2 = at_least_float32(z1), at_least_float32(z2)
            loss, terms = vicreg_loss(gather(z1), gather(z2), config.lam, config.mu, config.nu)
        return StepOutput(
            loss,
            embedding=z1.detach(),
            representation=at_least_float32(y1.detach()),
            terms={name: term.detach() for name, term in terms.items()},
        )
