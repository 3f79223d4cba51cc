"""MoCo, momentum contrast: the negatives are a queue of keys, which a slowly moving network made.

He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020 (v1); Chen,
Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020 (v2: an MLP as projector, more
augmentation, cosine schedule). Equation 1, with q an image's query, k its key, and k_i the queue before this batch:

    loss = -log(exp(q.k / T) / (exp(q.k / T) + sum_i exp(q.k_i / T)))

The key network follows after the optimizer's step, which is the same as before the next step's keys. `momentum: null`
is the memory bank: keys come from the weights that are being trained, so those of earlier batches are stale.

Shuffled batch norm (section 3.3): the images of the global batch are permuted and cut into `norm_groups` groups, each
with batch norm statistics of its own, so that a query cannot tell its key by the statistics that they share. The paper
has a group on each GPU. Here the number is a setting and a worker may have several, so the result does not depend on
the workers. The key network normalises by its batch alone; its running statistics are the query network's.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.device import put
from jem.distributed import all_reduce_mean, gather, keep_batch_norm_local, world
from jem.methods.base import Method, Progress, StepOutput, at_least_float32, mine
from jem.methods.infonce import info_nce
from jem.models.branch import Branch
from jem.models.memory import Queue
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, MoCoConfig
    from jem.models.backbones import Backbone


def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, as `info_nce`'s.

    Args:
        queries: (n, d), unit norm, in float32 or wider.
        keys: (n, d), unit norm, of the same images.
        queue: the negatives, (K, d), unit norm.
        temperature: T.
    """
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return info_nce(logits, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))


def tied_copy(network: Branch) -> Branch:
    """A copy that has the very parameters of `network`, and only its buffers for itself."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})


class MoCo(Method):
    """A network for the queries, one for the keys, and the queue."""

    config: MoCoConfig

    def __init__(self, config: MoCoConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.branch = Branch(backbone, config.projector)
        self.key_branch = momentum_copy(self.branch) if config.momentum else tied_copy(self.branch)
        if config.norm_groups > 1:
            keep_batch_norm_local(self.key_branch)
        self.queue = Queue(config.queue, config.projector[-1])
        self.queue.rows.copy_(functional.normalize(torch.randn_like(self.queue.rows), dim=1))
        self.pending: list[Tensor] = []
        """The global batch's keys of this step, (N, d) each."""

    @property
    def backbone(self) -> Backbone:
        """The query network's."""
        return self.branch.backbone

    @torch.no_grad()
    def keys(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Unit-norm keys of the global batch, (N, d), in its order, from this worker's part of it, (n, 3, H, W)."""
        groups = self.config.norm_groups
        if groups == 1:
            _, z = self.key_branch(images, mask)
            return functional.normalize(gather(at_least_float32(z)), dim=1)
        images, mask = gather(images), None if mask is None else gather(mask)
        order = put(torch.randperm(len(images), generator=self.generator), images.device)
        parts = mine(order).chunk(groups // world())
        z = torch.cat([self.key_branch(images[part], None if mask is None else mask[part])[1] for part in parts])
        return functional.normalize(gather(at_least_float32(z))[order.argsort()], dim=1)

    def forward(self, views: Views) -> StepOutput:
        """InfoNCE of the first view's queries to the second's keys; if symmetric, the mean of both directions."""
        first, second = views
        y1, z1 = self.branch(*first)
        pairs = [(z1, self.keys(*second))]
        if self.config.symmetric:
            pairs.append((self.branch(*second)[1], self.keys(*first)))
        self.pending += [keys for _, keys in pairs]
        with torch.autocast(z1.device.type, enabled=False):
            terms = [
                torch.stack(
                    moco_loss(
                        functional.normalize(at_least_float32(z), dim=1),
                        mine(keys),
                        self.queue.rows,
                        self.config.temperature,
                    )
                )
                for z, keys in pairs
            ]
            # an image's loss depends on the others' keys alone, which have no gradient: no need to gather the queries
            attraction, repulsion = all_reduce_mean(torch.stack(terms).mean(dim=0)).unbind()
        return self.output(
            attraction + repulsion, [z for z, _ in pairs], y1, {"attraction": attraction, "repulsion": repulsion}
        )

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the key network, then replace the queue's oldest keys by this step's."""
        if self.config.momentum:
            follow(self.key_branch, self.branch, decay(self.config.momentum, progress.share))
        for own, online in zip(self.key_branch.buffers(), self.branch.buffers(), strict=True):
            own.copy_(online)
        self.queue.put(torch.cat(self.pending))
        self.pending.clear()
