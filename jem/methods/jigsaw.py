"""Jigsaw puzzles: in which order are the nine patches of the image?

Noroozi, Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", ECCV 2016.

    loss = mean over images of -log p(k | the patches in the order of permutation k),  k drawn from a set of P

Each patch goes through the same backbone, and a classifier sees the nine representations in the order given. The set is
chosen greedily: the next permutation is the one whose smallest Hamming distance to those chosen is largest (the paper
maximises the mean distance, which lets pairs be close), ties broken by the mean distance, then by lexicographic order,
so that the set is the same everywhere. The paper draws the first one; here it is the order 0 to 8.
"""

from __future__ import annotations

from itertools import chain, permutations
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from jem.device import put
from jem.distributed import gather, world
from jem.methods.base import Method, StepOutput, everyones, mine
from jem.methods.patches import PATCHES, cut_patches
from jem.models.backbones import Backbone, build_backbone
from jem.models.heads import mlp

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, JigsawConfig


def distant_permutations(count: int, length: int = PATCHES) -> Tensor:
    """`count` permutations of `length` things that are far apart, int64 (count, length); always the same.

    Raises:
        ValueError: there are not so many.
    """
    # a column for each, in lexicographic order; numpy's argmax takes the first of the largest
    numbers = np.fromiter(chain.from_iterable(permutations(range(length))), np.uint8)
    every = np.ascontiguousarray(numbers.reshape(-1, length).T)
    if count > every.shape[1]:
        raise ValueError(f"there are {every.shape[1]} permutations of {length}, and not {count}")
    nearest, total = np.full(every.shape[1], length, np.int32), np.zeros(every.shape[1], np.int32)
    chosen = [0]
    while len(chosen) < count:
        distance = (every != every[:, chosen[-1:]]).sum(axis=0, dtype=np.int32)
        nearest, total = np.minimum(nearest, distance), total + distance
        # in the order of both, as no total exceeds length * count
        chosen.append(int(np.argmax(nearest * (length * count + 1) + total)))
    return torch.from_numpy(every[:, chosen].T.astype(np.int64))


def standard_patches(patches: Tensor) -> Tensor:
    """Patches, (N, 9, 3, p, p), each with mean 0 and variance var / (var + 1e-5) per channel."""
    mean = patches.mean(dim=(-2, -1), keepdim=True)
    return (patches - mean) * torch.rsqrt(patches.var(dim=(-2, -1), correction=0, keepdim=True) + 1e-5)


class Jigsaw(Method):
    """Backbone, and a classifier over the nine representations in a row."""

    config: JigsawConfig
    permutations: Tensor
    """int64 (P, 9)."""

    def __init__(self, config: JigsawConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.network = build_backbone(backbone)
        self.classifier = mlp((PATCHES * self.network.dim, *config.classifier, config.permutations))
        self.register_buffer("permutations", distant_permutations(config.permutations))

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.network

    def forward(self, views: Views) -> StepOutput:
        """Cross entropy; representation and embedding are those of the patch that comes first."""
        ((images, _),) = views
        count = len(images)
        patches = cut_patches(images, self.config.patch, self.generator)
        if self.config.normalise:
            patches = standard_patches(patches)
        drawn = torch.randint(self.config.permutations, (world() * count,), generator=self.generator)
        truth = put(mine(drawn), images.device)
        order = self.permutations[truth]
        shuffled = patches[torch.arange(count, device=images.device)[:, None], order]
        y = self.network(shuffled.flatten(0, 1)).unflatten(0, (count, PATCHES))
        logits = self.classifier(y.flatten(1))
        with torch.autocast(images.device.type, enabled=False):
            every, labels = everyones(logits), gather(truth)
            loss = functional.cross_entropy(every, labels)
        accuracy = (every.argmax(dim=1) == labels).to(every.dtype).mean()
        first = cast("Tensor", y[:, 0])
        return self.output(loss, (first,), first, {"cross_entropy": loss, "accuracy": accuracy})
