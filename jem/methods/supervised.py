"""Supervised baseline: cross entropy on the labels, for comparison with what is learnt without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import gather
from jem.methods.base import Method, StepOutput, everyones
from jem.models.backbones import Backbone, build_backbone

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, SupervisedConfig


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the labelled images, 0 if there is none; logits (N, K), labels int64 (N,), -1 for no label."""
    total = functional.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


class Supervised(Method):
    """Backbone and linear classifier; the loss is averaged over the views."""

    config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, backbone: BackboneConfig, classes: int) -> None:
        super().__init__(config)
        self.network = build_backbone(backbone)
        self.classifier = nn.Linear(self.network.dim, classes)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.network

    def forward(self, views: Views) -> StepOutput:
        """Cross entropy of every view, averaged; the embedding is the logits."""
        representations = self.network.each(views)
        logits = [self.classifier(y) for y in representations]
        labels = gather(views.label)
        with torch.autocast(labels.device.type, enabled=False):
            every = [everyones(each) for each in logits]
            losses = [cross_entropy(each, labels, self.config.label_smoothing) for each in every]
            loss = torch.stack(losses).mean()
        labelled = labels >= 0
        right = (every[0].argmax(dim=1) == labels) & labelled
        terms = {"cross_entropy": loss, "accuracy": right.sum() / labelled.sum().clamp(min=1)}
        return self.output(loss, logits, representations[0], terms)
