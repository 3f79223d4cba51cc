"""PIRL: an image and the jigsaw of its patches get the same embedding, whatever the patches' order.

Misra, van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", CVPR 2020. f is the head of the
image I, g that of its jigsaw I^t, and m_I the bank's row of I, a moving average of f(v_I) (equations 3 to 5):

    loss = lambda L(m_I, g(v_It)) + (1 - lambda) L(m_I, f(v_I))
    L(m_I, v) = -log h(m_I, v) - sum_I' log(1 - h(m_I', v))
    h(m, v) = exp(s(m, v) / T) / (exp(s(m_I, v) / T) + sum_I' exp(s(m_I', v) / T)),    s the cosine similarity

The paper writes h for the positive only; for a negative it is taken over the same candidates, so that h sums to 1. The
published code leaves out the sum over the negatives: the equation is followed. The negatives m_I' are rows of the bank,
drawn with replacement for each batch and shared by its images (the paper: for each image, which costs a copy of the
rows for every one of them); an image's own row is no negative of it.

g passes each of the 9 patches through the backbone and a head, and the concatenation, in an order drawn for each image,
through a linear layer. The second view is the jigsaw's image. Its colours are jittered before it is cut; the paper
jitters each patch by itself. With `norm` both heads end in a batch norm; the paper's do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.device import put
from jem.distributed import all_reduce_mean, gather, world
from jem.errors import InputError
from jem.methods.base import Method, Progress, StepOutput, at_least_float32, mine
from jem.methods.patches import PATCHES, cut_patches
from jem.models.branch import Branch
from jem.models.heads import mlp
from jem.models.memory import Bank

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, PIRLConfig
    from jem.models.backbones import Backbone

SHARE = 64 / 85
"""Side of a patch as a share of its cell's (section 3.3: 64 pixels out of a third of 255)."""


def nce(v: Tensor, positive: Tensor, negatives: Tensor, own: Tensor, temperature: float) -> Tensor:
    """L(m_I, v), averaged over the images; a scalar.

    Args:
        v: embeddings, (n, d), of any norm, in float32 or wider.
        positive: the images' rows of the bank, (n, d), unit norm.
        negatives: rows of the bank, (K, d), unit norm.
        own: bool (n, K), True where a negative is the image's own row and does not count.
        temperature: T.
    """
    v = functional.normalize(v, dim=1)
    others = (v @ negatives.T).masked_fill(own, -torch.inf)
    log_h = torch.cat([(v * positive).sum(dim=1, keepdim=True), others], dim=1).div(temperature).log_softmax(dim=1)
    # a negative that is nearest by far has an h that rounds to 1, where the logarithm has no gradient
    h = log_h[:, 1:].exp().clamp(max=1 - torch.finfo(v.dtype).eps)
    return (-log_h[:, 0] - torch.log1p(-h).sum(dim=1)).mean()


class PIRL(Method):
    """One backbone, a head for images and one for jigsaws, and a bank of all images' embeddings.

    Args:
        config: its settings.
        backbone: of both.
        images: rows of the bank; ids are less.
    """

    config: PIRLConfig

    def __init__(self, config: PIRLConfig, backbone: BackboneConfig, images: int) -> None:
        super().__init__(config)
        dim = config.projector[-1]
        self.branch = Branch(backbone, config.projector, last_norm=config.norm)
        self.patch_projector = mlp((self.backbone.dim, *config.projector), last_bias=not config.norm)
        self.jigsaw = mlp((PATCHES * dim, dim), last_norm=config.norm)
        self.bank = Bank(images, dim)
        self.bank.rows.copy_(functional.normalize(torch.randn_like(self.bank.rows), dim=1))
        self.first_epoch = True
        """All ids come in it, so that is when they are checked."""
        self.pending: list[tuple[Tensor, Tensor]] = []
        """The global batch's ids and unit-norm embeddings of this step, (N,) and (N, d) each."""

    @property
    def backbone(self) -> Backbone:
        """The branch's."""
        return self.branch.backbone

    def before_step(self, progress: Progress) -> None:
        """See the base class."""
        super().before_step(progress)
        self.first_epoch = progress.epoch == 0

    def jigsaw_embedding(self, images: Tensor) -> Tensor:
        """This worker's images, (n, 3, H, W), cut into patches and embedded by g, (n, d)."""
        count = len(images)
        patches = cut_patches(images, self.config.patch_size, self.generator, SHARE)
        each = self.patch_projector(self.backbone(patches.flatten(0, 1))).unflatten(0, (count, PATCHES))
        order = mine(torch.rand(world() * count, PATCHES, generator=self.generator)).argsort(dim=1)
        shuffled = each.take_along_dim(put(order, each.device)[:, :, None], dim=1)
        return self.jigsaw(shuffled.flatten(1))  # type: ignore[no-any-return]

    def forward(self, views: Views) -> StepOutput:
        """NCE of an image (first view) and of its jigsaw (second view) against the bank.

        Raises:
            InputError: an id without a row in the bank, or a mask for the second view.
        """
        first, (second, mask) = views
        if mask is not None:
            raise InputError("PIRL takes the second view apart, so it cannot be masked: leave out that view's mask")
        if self.first_epoch:
            self.bank.check(views.id)
        y1, image = self.branch(*first)
        jigsaw = self.jigsaw_embedding(second)
        config, rows = self.config, self.bank.rows
        drawn = put(torch.randint(len(rows), (config.negatives,), generator=self.generator), rows.device)
        with torch.autocast(image.device.type, enabled=False):
            own, positive, negatives = views.id[:, None] == drawn, rows[views.id], rows[drawn]
            losses = [nce(at_least_float32(v), positive, negatives, own, config.temperature) for v in (jigsaw, image)]
            # an image's loss depends on the bank alone, not on the others' embeddings: no need to gather them
            of_jigsaw, of_image = all_reduce_mean(torch.stack(losses)).unbind()
            loss = config.lam * of_jigsaw + (1 - config.lam) * of_image
        embedding = functional.normalize(at_least_float32(image.detach()), dim=1)
        self.pending.append((gather(views.id), gather(embedding)))
        return self.output(loss, (image, jigsaw), y1, {"jigsaw": of_jigsaw, "image": of_image})

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move this step's rows of the bank towards the images' embeddings."""
        keep = self.config.bank_momentum
        for ids, embedding in self.pending:
            self.bank.put(ids, functional.normalize(keep * self.bank.rows[ids] + (1 - keep) * embedding, dim=1))
        self.pending.clear()
