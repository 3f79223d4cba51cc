"""DeepCluster: k-means over the embeddings of the whole data set, whose clusters the network learns to predict.

v2: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020, appendix. At each epoch's start a spherical k-means for each head h clusters the embeddings
that the images had last; its centroids C_h are the head's prototypes, which no gradient moves, and

    loss = mean over the heads h, the views t and the images of  -log softmax_a(z_t C_h^T / T)

z: unit-norm embeddings; a: the image's cluster in h, the same for all its views.

original: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.
After the same k-means a linear classifier on the embedding, reset at each epoch's start, takes the centroids' place,
and an image weighs 1 / the size of its cluster (section 3.3). What the optimizer remembers of the classifier (momentum)
is the last epoch's then, and fades within some steps. The paper clusters whitened features, this normalised embeddings.

Before the first epoch is over there is nothing to cluster: it only fills the bank, with the first view's embeddings by
a network that stands still, and its loss is 0. (The published code passes over the data before it counts epochs.) That
code keeps a bank of each global view, and the heads take turns; here there is one, of the first view. An image that was
not seen yet has no assignment (-1) and does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import gather
from jem.errors import InputError
from jem.methods.base import Method, Progress, StepOutput, everyones
from jem.methods.kmeans import spherical_kmeans
from jem.models.branch import Branch
from jem.models.memory import Bank

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, DeepClusterConfig
    from jem.models.backbones import Backbone

UNSEEN = -1


def assignment_loss(scores: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean cross entropy of the images that have an assignment, 0 if none has.

    Args:
        scores: with the clusters, (N, K), over the temperature.
        target: int64 (N,), -1 for an image that does not count.
        weight: of an image, by its cluster, (K,).
    """
    total = functional.cross_entropy(scores, target, weight, ignore_index=UNSEEN, reduction="sum")
    counted = (weight[target.clamp(min=0)] * (target != UNSEEN)).sum()
    return total / torch.where(counted > 0, counted, 1)


class DeepCluster(Method):
    """A branch for all views, a bank of its embeddings, and the clusters of each head."""

    config: DeepClusterConfig
    prototypes: Tensor
    """(K_1 + K_2 + ..., d), the centroids of all heads' clusters, one head after the other."""
    weights: Tensor
    """(K_1 + K_2 + ...,), of the images in each cluster."""
    assignments: Tensor
    """int64 (images, heads), -1 for an image that was not seen yet."""

    def __init__(self, config: DeepClusterConfig, backbone: BackboneConfig, images: int) -> None:
        super().__init__(config)
        most, total, dim = max(config.prototypes), sum(config.prototypes), config.projector[-1]
        if images < most:
            raise InputError(
                f"method.prototypes {most} are more than the data set's {images} images: k-means needs an image for "
                "each; lower prototypes"
            )
        self.branch = Branch(backbone, config.projector)
        self.bank = Bank(images, dim)
        self.classifier = nn.Linear(dim, total) if config.alternation == "original" else None
        self.register_buffer("prototypes", torch.zeros(total, dim))
        self.register_buffer("weights", torch.ones(total))
        self.register_buffer("assignments", torch.full((images, len(config.prototypes)), UNSEEN))
        self._clusters = list(config.prototypes)
        self._filling = True
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def backbone(self) -> Backbone:
        """The branch's."""
        return self.branch.backbone

    def before_step(self, progress: Progress) -> None:
        """At the start of each epoch but the first, cluster the bank."""
        super().before_step(progress)
        self._filling = progress.epoch == 0
        if progress.first and not self._filling:
            self._cluster()

    @torch.no_grad()
    def _cluster(self) -> None:
        """New prototypes and assignments; for the original, a new classifier and the clusters' weights."""
        seen = self.bank.seen.nonzero()[:, 0]
        rows = self.bank.rows[seen]
        centroids = torch.split(self.prototypes, self._clusters)
        weights = torch.split(self.weights, self._clusters)
        for head, clusters in enumerate(self._clusters):
            found, assigned = spherical_kmeans(rows, clusters, self.config.iterations, self.generator)
            centroids[head].copy_(found)
            self.assignments[seen, head] = assigned
            if self.classifier is not None:
                weights[head].copy_(1 / torch.bincount(assigned, minlength=clusters).clamp(min=1))
        if self.classifier is not None:
            self.classifier.weight.copy_(torch.randn(self.classifier.weight.shape, generator=self.generator) * 0.01)
            self.classifier.bias.zero_()

    def forward(self, views: Views) -> StepOutput:
        """DeepCluster of any number of views; in the first epoch, the embeddings of the first."""
        ids = gather(views.id)
        if self._filling:
            self.bank.check(ids)
            with torch.no_grad():
                y1, z1 = self.branch(*next(iter(views)))
            self._pending.append((ids, everyones(z1)))
            # every parameter gets a gradient, of 0: DDP waits for it
            loss = 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
            return self.output(loss, (z1,), y1, {"clustering": loss, "accuracy": torch.zeros_like(loss)})

        representations, embeddings = zip(*self.branch.each(views), strict=True)
        with torch.autocast(ids.device.type, enabled=False):
            every = [everyones(z) for z in embeddings]
            loss, accuracy = self._predict(every, self.assignments[ids])
        self._pending.append((ids, every[0].detach()))
        return self.output(loss, embeddings[:2], representations[0], {"clustering": loss, "accuracy": accuracy})

    def _predict(self, every: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and share of the predictions that are right, of all views' embeddings (N, d), targets (N, heads)."""
        losses, right = [], []
        weights = torch.split(self.weights, self._clusters)
        for z in every:
            scores = torch.split(self._scores(z), self._clusters, dim=1)
            for score, target, weight in zip(scores, targets.unbind(dim=1), weights, strict=True):
                losses.append(assignment_loss(score, target, weight))
                right.append((score.argmax(dim=1) == target).sum() / (target != UNSEEN).sum().clamp(min=1))
        return torch.stack(losses).mean(), torch.stack(right).mean()

    def _scores(self, z: Tensor) -> Tensor:
        """Logits of embeddings (N, d), all heads' beside each other."""
        if self.classifier is not None:
            return cast("Tensor", self.classifier(z))
        return functional.normalize(z, dim=1) @ self.prototypes.T / self.config.temperature

    def after_backward(self, progress: Progress) -> None:
        """Let nothing move in the first epoch, not even by a weight decay."""
        if progress.epoch == 0:
            for parameter in self.parameters():
                parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """Put the first view's embeddings into the bank."""
        for ids, z in self._pending:
            self.bank.put(ids, functional.normalize(z, dim=1))
        self._pending.clear()
