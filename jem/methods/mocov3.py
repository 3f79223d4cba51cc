"""MoCo v3: momentum contrast without a queue; the negatives are the other keys of the batch.

Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021 (algorithm 1):

    loss = ctr(q1, k2) + ctr(q2, k1),    ctr(q, k) = 2 T mean_i -log(exp(q_i.k_i / T) / sum_j exp(q_i.k_j / T))

The queries pass a predictor, the keys come from a momentum network without one and have no gradient. Projector and
predictor have batch norm after their last layer too, as the paper says; the published code leaves the predictor's out
for ResNets. The paper's frozen patch embedding of ViTs is not followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.distributed import all_reduce_mean, gather, rank
from jem.methods.base import Method, Progress, StepOutput, at_least_float32
from jem.methods.infonce import info_nce
from jem.models.branch import Branch
from jem.models.heads import mlp
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, MoCoV3Config
    from jem.models.backbones import Backbone


def ctr(queries: Tensor, keys: Tensor, temperature: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """The two terms of ctr, as `info_nce`'s times 2 T.

    Args:
        queries: (n, d), of any norm, in float32 or wider.
        keys: (N, d), of any norm; those of the queries' images are at `first` to `first + n`.
        temperature: T.
        first: see `keys`.
    """
    logits = functional.normalize(queries, dim=1) @ functional.normalize(keys, dim=1).T / temperature
    attraction, repulsion = info_nce(logits, torch.arange(first, first + len(queries), device=queries.device))
    return 2 * temperature * attraction, 2 * temperature * repulsion


class MoCoV3(Method):
    """A network and predictor for the queries, and the momentum network for the keys."""

    config: MoCoV3Config

    def __init__(self, config: MoCoV3Config, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.branch = Branch(backbone, config.projector, last_norm=True)
        dim = config.projector[-1]
        self.predictor = mlp((dim, *config.predictor, dim), last_norm=True)
        self.key_branch = momentum_copy(self.branch)

    @property
    def backbone(self) -> Backbone:
        """The query network's."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """The symmetric loss of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            k1, k2 = (gather(at_least_float32(z)) for _, z in self.key_branch.each(views))
        with torch.autocast(z1.device.type, enabled=False):
            start, temperature = rank() * len(z1), self.config.temperature
            directions = [torch.stack(ctr(at_least_float32(q), k, temperature, start)) for q, k in ((q1, k2), (q2, k1))]
            # a query's loss depends on the others' keys alone, which have no gradient: no need to gather the queries
            attraction, repulsion = all_reduce_mean(torch.stack(directions).sum(dim=0)).unbind()
        return self.output(attraction + repulsion, (z1, z2), y1, {"attraction": attraction, "repulsion": repulsion})

    def after_step(self, progress: Progress) -> None:
        """Move the key network."""
        follow(self.key_branch, self.branch, decay(self.config.momentum, progress.share))
