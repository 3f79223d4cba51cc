"""data2vec, for images.

Baevski et al., "data2vec: a general framework for self-supervised learning in speech, vision and language", ICML 2022.

    target y = mean over the teacher's last K blocks of norm(a_l),  a_l: the block's output for the *whole* image
    prediction f = linear(student's token),                          the student sees the image with masked patches
    loss = mean over the masked patches and the dimensions of smooth_l1(f - y)

    smooth_l1(x) = x² / (2 beta) if |x| <= beta, else |x| - beta / 2        (equation 2);  l2: x²
    after the optimizer's step:  teacher = tau teacher + (1 - tau) student  (equation 1, tau rises linearly)

norm is a layer norm over the dimensions of each patch, without weight and bias. a_l is what the block hands on, after
its last sum (the paper compares other places in the block).

The diagnostics look at the target, averaged over the patches: a teacher that has collapsed, to one vector or to one for
each position whatever the image, gives every image the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import all_reduce_mean
from jem.errors import InputError
from jem.methods.base import Method, Progress, StepOutput, at_least_float32
from jem.models.backbones import build_backbone
from jem.models.momentum import decay, follow, momentum_copy
from jem.models.vit import ViT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jem.batch import Views
    from jem.config import BackboneConfig, Data2vecConfig
    from jem.models.backbones import Backbone


def contextual_target(blocks: Sequence[Tensor], top: int) -> Tensor:
    """Mean of the last `top` blocks' outputs, each normalised over its dimensions; (N, P, D) each, to (N, P, D)."""
    normalised = [functional.layer_norm(at_least_float32(a), a.shape[-1:]) for a in blocks[-top:]]
    return torch.stack(normalised).mean(dim=0)


def masked_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, loss: Literal["smooth_l1", "l2"], beta: float
) -> Tensor:
    """Sum over the masked patches of the loss, averaged over the dimensions; a scalar.

    Args:
        prediction: (N, P, D).
        target: (N, P, D).
        mask: bool (N, P), True where a patch is masked.
        loss: on each entry.
        beta: where smooth_l1 turns from squared to absolute.
    """
    if loss == "l2":
        entries = functional.mse_loss(prediction, target, reduction="none")
    else:
        entries = functional.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    return (entries.mean(dim=2) * mask).sum()


class Data2vec(Method):
    """Student with a linear head, and teacher."""

    config: Data2vecConfig

    def __init__(self, config: Data2vecConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        student = build_backbone(backbone)
        if not isinstance(student, ViT) or student.mask_token is None:
            raise InputError("data2vec needs a ViT with backbone.masked: token")
        self.student = student
        self.teacher = momentum_copy(student)
        self.head = nn.Linear(student.dim, student.dim)

    @property
    def backbone(self) -> Backbone:
        """The student's."""
        return self.student

    def forward(self, views: Views) -> StepOutput:
        """data2vec of one masked view.

        Raises:
            InputError: the view has no mask.
        """
        ((images, mask),) = views
        if mask is None:
            raise InputError("data2vec predicts what a mask hides, and the view has none: set augment.views' mask")
        tokens = self.student.tokens(images, mask)
        prediction = self.head(tokens[:, 1:])
        with torch.no_grad():
            blocks = [tokens[:, 1:] for tokens in self.teacher.blocks_output(images)]
        with torch.autocast(images.device.type, enabled=False):
            prediction = at_least_float32(prediction)
            target = contextual_target(blocks, self.config.top)
            # the workers' masks may hide different numbers of patches
            total = all_reduce_mean(masked_loss(prediction, target, mask, self.config.loss, self.config.beta))
            loss = total / all_reduce_mean(mask.sum().to(total.dtype))
            predicted = (prediction * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        y = tokens[:, 0] if self.student.config.pool == "cls" else tokens[:, 1:].mean(dim=1)
        output = self.output(loss, (predicted,), y, {"regression": loss})
        return replace(output, embedding=target.mean(dim=1))

    def after_step(self, progress: Progress) -> None:
        """Move the teacher."""
        follow(self.teacher, self.student, decay(self.config.momentum, progress.share))
