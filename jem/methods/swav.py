"""SwAV: swapped prediction of the cluster assignments (codes) of two views.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020.

    loss = mean over the global views s and all views t != s of  -sum_k q_s^k log softmax_k(z_t C^T / T)     (eq. 1, 2)

z: unit-norm embeddings; C: prototypes, unit norm after every step; q: codes, the optimal transport of the batch's
scores z C^T onto the prototypes in equal parts (Sinkhorn-Knopp, eq. 3 to 5), without gradient. They are of the two
global views only (multi-crop). Where paper and published code differ, this follows the code: the prototypes stand still
in the first epoch, and a queue's embeddings get their scores from the present prototypes. Other than the code, every
view is a forward pass of its own (the code joins those of one size, so its batch norms see them together), and the
queue is filled from the first step, not from the epoch in which it joins.

The diagnostics look at the prediction softmax(z C^T / T) of the first view too: without the equal partition all images
choose the same prototype, while their embeddings still differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.methods.base import Method, Progress, StepOutput, at_least_float32, everyones, mine
from jem.models.branch import Branch
from jem.models.memory import Queue

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, SwAVConfig
    from jem.models.backbones import Backbone

GLOBAL = 2


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes: the matrix exp(scores / epsilon) with its sums over the images and over the prototypes made equal in turn.

    In the logarithm, where no score is too large for any epsilon. Every image's codes sum to 1 (to rounding). Each
    prototype's sum comes closer to N / K with every iteration and is not yet there after the paper's 3, the more so the
    smaller epsilon is: with 256 random embeddings, 64 prototypes and epsilon 0.05 it is off by up to a half.

    Args:
        scores: of N images with K prototypes, (N, K).
        epsilon: weight of the codes' entropy; they are uniform where it is large, hard where it is small.
        iterations: 0 for the softmax of scores / epsilon, which has no equal partition.

    Returns:
        (N, K), in float32 or wider; the paper's Q transposed and times N.
    """
    log = at_least_float32(scores) / epsilon
    for _ in range(iterations):
        log = log.log_softmax(dim=0).log_softmax(dim=1)
    return log.softmax(dim=1)


def swapped_prediction(scores: list[Tensor], codes: list[Tensor], temperature: float) -> Tensor:
    """Mean cross entropy of each view's prediction with the codes of every other global view.

    Args:
        scores: of V views with the prototypes, (N, K) each, the global views' first.
        codes: of the global views, (N, K) each.
        temperature: T of the prediction.
    """
    log_p = [(each / temperature).log_softmax(dim=1) for each in scores]
    pairs = [-(q * log_p[t]).sum(dim=1).mean() for s, q in enumerate(codes) for t in range(len(scores)) if t != s]
    return torch.stack(pairs).mean()


class SwAV(Method):
    """A branch for all views, the prototypes, and a queue for each global view if it is asked for."""

    config: SwAVConfig

    def __init__(self, config: SwAVConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        dim = config.projector[-1]
        self.branch = Branch(backbone, config.projector)
        self.prototypes = nn.Parameter(functional.normalize(torch.randn(config.prototypes, dim), dim=1))
        self.queues = nn.ModuleList(Queue(config.queue, dim) for _ in range(GLOBAL if config.queue else 0))
        self._queued = False
        self._pending: list[list[Tensor]] = []

    @property
    def backbone(self) -> Backbone:
        """The branch's."""
        return self.branch.backbone

    def before_step(self, progress: Progress) -> None:
        """Let the queues join from their epoch on, and once they are full (they wait for the device until then)."""
        super().before_step(progress)
        if progress.epoch < self.config.queue_from_epoch:
            self._queued = False
        elif not self._queued and len(self.queues):
            self._queued = all(int(cast("Queue", each).filled) == self.config.queue for each in self.queues)

    def forward(self, views: Views) -> StepOutput:
        """SwAV of two global views and any number of local ones."""
        representations, embeddings = zip(*self.branch.each(views), strict=True)
        config = self.config
        with torch.autocast(embeddings[0].device.type, enabled=False):
            every = [functional.normalize(everyones(z), dim=1) for z in embeddings]
            scores = [z @ self.prototypes.T for z in every]
            codes = [self._codes(view, scores[view]) for view in range(GLOBAL)]
            loss = swapped_prediction(scores, codes, config.temperature)
            used = torch.stack([q.mean(dim=0) for q in codes])
            perplexity = torch.special.entr(used).sum(dim=1).exp().mean()
            assignment = mine(scores[0] / config.temperature).softmax(dim=1)
        if config.queue:
            self._pending.append([z.detach() for z in every[:GLOBAL]])
        terms = {"swapped": loss, "perplexity": perplexity}
        return self.output(loss, embeddings[:GLOBAL], representations[0], terms, assignment)

    @torch.no_grad()
    def _codes(self, view: int, scores: Tensor) -> Tensor:
        """Codes of a global view's images, (N, K), the queue's embeddings before them in the transport."""
        config = self.config
        if not self._queued:
            return sinkhorn(scores, config.epsilon, config.iterations)
        earlier = cast("Queue", self.queues[view]).rows @ self.prototypes.T
        return sinkhorn(torch.cat([earlier, scores]), config.epsilon, config.iterations)[len(earlier) :]

    def after_backward(self, progress: Progress) -> None:
        """Let the prototypes stand still in the first epochs."""
        if progress.epoch < self.config.freeze_epochs:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Put the prototypes back on the sphere, and the global views' embeddings into the queues."""
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))
        for view, queue in enumerate(self.queues):
            cast("Queue", queue).put(torch.cat([part[view] for part in self._pending]))
        self._pending.clear()
