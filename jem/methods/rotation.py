"""Rotation prediction: which way up is the image?

Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018.

    loss = mean over images and rotations k of -log p(k | image rotated by 90 k degrees),  k = 0, 1, 2, 3

All four rotations of each image are in the batch, as in the paper, or one at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.device import put
from jem.distributed import gather, world
from jem.methods.base import Method, StepOutput, everyones, mine
from jem.models.backbones import Backbone, build_backbone

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, RotationConfig

ROTATIONS = 4


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Images, (N, C, H, H), each turned anticlockwise by 90 degrees `turns` times, int64 (N,) of 0 to 3."""
    every = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(ROTATIONS)])
    return every[turns, torch.arange(len(images), device=images.device)]


class Rotation(Method):
    """Backbone and linear classifier."""

    config: RotationConfig

    def __init__(self, config: RotationConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.network = build_backbone(backbone)
        self.classifier = nn.Linear(self.network.dim, ROTATIONS)

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.network

    def forward(self, views: Views) -> StepOutput:
        """Cross entropy; the embedding is the representation: of the upright images, where all four are seen."""
        ((images, mask),) = views
        count = len(images)
        if self.config.rotations == "all":
            turns = torch.arange(ROTATIONS).repeat_interleave(count)
            images = images.repeat(ROTATIONS, 1, 1, 1)
            mask = None if mask is None else mask.repeat(ROTATIONS, 1)
        else:
            turns = mine(torch.randint(ROTATIONS, (world() * count,), generator=self.generator))
        turns = put(turns, images.device)
        representation = self.network(rotated(images, turns), mask)
        logits = self.classifier(representation)
        with torch.autocast(images.device.type, enabled=False):
            every, truth = everyones(logits), gather(turns)
            loss = functional.cross_entropy(every, truth)
        accuracy = (every.argmax(dim=1) == truth).to(every.dtype).mean()
        first = representation[:count]
        return self.output(loss, (first,), first, {"cross_entropy": loss, "accuracy": accuracy})
