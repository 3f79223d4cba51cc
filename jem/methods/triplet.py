"""Triplet loss: a negative must be further away than the positive, by a margin.

Wang, Gupta, "Unsupervised Learning of Visual Representations using Videos", ICCV 2015 (cosine distance, margin 0.5).
Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015.

    loss = mean over anchors a and negatives n of max(0, D(a, p) - D(a, n) + margin)

Each view of each image is an anchor, the image's other view its positive p, and all views of the other images in the
global batch are negatives: all of them count, or only the nearest one to each anchor. D is 1 - cos, or the squared
distance of the embeddings as they are; FaceNet's, the squared distance of embeddings of length 1, is 2 (1 - cos), so a
margin of 0.2 there is one of 0.1 here. (Both papers also mine: FaceNet "semi-hard" negatives, Wang and Gupta the K
triplets of the largest loss. The hardest are FaceNet's and the latter's with K = 1.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from jem.methods.base import Method, StepOutput, everyones
from jem.models.branch import Branch

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, TripletConfig
    from jem.models.backbones import Backbone


def squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|² of all pairs of rows; (M, d) to (M, M), not negative."""
    norms = z.square().sum(dim=1)
    return (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp(min=0)


def of_other_images(pairs: Tensor) -> Tensor:
    """What `pairs` says of each row and the views of other images, (2 N, 2 N - 2).

    Args:
        pairs: of all pairs of rows, (2 N, 2 N); N images' first views, then their second ones.
    """
    n = len(pairs) // 2
    image, others = torch.arange(2 * n, device=pairs.device) % n, torch.arange(n - 1, device=pairs.device)
    # by their indices: how many a mask chooses would have to be read from the device
    columns = others + (others >= image[:, None])
    return pairs.gather(1, torch.cat([columns, columns + n], dim=1))


def triplet_loss(
    z1: Tensor,
    z2: Tensor,
    margin: float,
    distance: Literal["cosine", "euclidean"] = "cosine",
    negatives: Literal["all", "hardest"] = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch; as a term, the share of the triplets that violate the margin.

    Args:
        z1: embeddings of the first view, (N, d), in float32 or wider; N at least 2.
        z2: embeddings of the second view, (N, d).
        margin: how much larger D(a, n) must be than D(a, p).
        distance: D.
        negatives: which count.
    """
    z, n = torch.cat([z1, z2]), len(z1)
    if distance == "cosine":
        unit = functional.normalize(z, dim=1)
        distances = 1 - unit @ unit.T
    else:
        distances = squared_distances(z)
    positive = torch.cat([distances.diagonal(n), distances.diagonal(-n)])  # (2 N,): (i, N + i), then (N + i, i)
    negative = of_other_images(distances)
    if negatives == "hardest":
        negative = negative.amin(dim=1, keepdim=True)
    excess = positive[:, None] - negative + margin
    return functional.relu(excess).mean(), {"violations": (excess > 0).to(z.dtype).mean()}


class Triplet(Method):
    """One network for both views, and the loss on the gathered embeddings."""

    config: TripletConfig

    def __init__(self, config: TripletConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        # distances are blind to a shift of all embeddings, cosines are not
        self.branch = Branch(backbone, config.projector, last_bias=config.distance == "cosine")

    @property
    def backbone(self) -> Backbone:
        """The one there is."""
        return self.branch.backbone

    def forward(self, views: Views) -> StepOutput:
        """Triplet loss of two views."""
        (y1, z1), (_, z2) = self.branch.each(views)
        with torch.autocast(z1.device.type, enabled=False):
            config = self.config
            loss, terms = triplet_loss(everyones(z1), everyones(z2), config.margin, config.distance, config.negatives)
        return self.output(loss, (z1, z2), y1, terms)
