"""DINO: self-distillation with no labels.

Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021.

    q_i = softmax((t_i - c) / T_t),  p_j = softmax(s_j / T_s)          t, s: teacher's and student's output, (N, K)
    loss = mean over i in the global views, j in all views, j != i, of  -sum_k q_ik log p_jk   (equations 1 to 3)
    after the optimizer's step:  c = m c + (1 - m) mean(t),  teacher = tau teacher + (1 - tau) student   (equation 4)

The mean of t is over the teacher's views of the global batch, with the centre of before the loss. Equation 3 sums over
the pairs; the published code, and this, averages. The teacher's temperature rises linearly, once an epoch: it is the
first one at epoch 0 and the last one from epoch `warmup_epochs` on.

The loss is the teacher's entropy plus the divergence KL(q|p), the two curves of the paper's figure 7: a divergence of 0
is a collapse, to one dimension if the entropy is 0, to the uniform distribution if it is log K. The diagnostics look at
the teacher's probabilities q for the first view too: in both collapses all images have the same. The output t does not
show the second one: it may differ from image to image by what all its dimensions share.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.distributed import all_reduce_mean
from jem.methods.base import Method, Progress, StepOutput, at_least_float32
from jem.models.backbones import build_backbone
from jem.models.heads import mlp
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jem.batch import Views
    from jem.config import BackboneConfig, DINOConfig
    from jem.models.backbones import Backbone


def dino_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], centre: Tensor, teacher_temperature: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy over the pairs of different views, and the teacher's entropy; scalars, means over the batch.

    They are the means of the workers' own, equal parts, so no output need be gathered.

    Args:
        teacher: outputs for the global views, (N, K) each.
        student: outputs for all views in the same order, (N, K) each.
        centre: (K,).
        teacher_temperature: of the teacher's softmax.
        temperature: of the student's.
    """
    log_q = [functional.log_softmax((t.detach() - centre) / teacher_temperature, dim=1) for t in teacher]
    q = [each.exp() for each in log_q]
    log_p = [functional.log_softmax(s / temperature, dim=1) for s in student]
    pairs = [-(q[i] * log_p[j]).sum(dim=1).mean() for i in range(len(q)) for j in range(len(log_p)) if i != j]
    entropies = [-(each * log).sum(dim=1).mean() for each, log in zip(q, log_q, strict=True)]
    return torch.stack(pairs).mean(), torch.stack(entropies).mean()


class Network(nn.Module):
    """Backbone, projector to the bottleneck, and the last layer: K cosines of it with the prototypes.

    The last layer is weight-normalised with its norms fixed at 1, and has no bias: of a prototype only the direction
    counts.
    """

    def __init__(self, config: DINOConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.projector = mlp((self.backbone.dim, *config.projector), norm=config.norm, gelu=True)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(config.projector[-1], config.prototypes, bias=False)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Representation (N, D), bottleneck (N, d) before it is normalised, and output (N, K) of one view."""
        return self.headed(self.backbone(images, mask))

    def each(self, views: Iterable[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same of each view; the backbone may take them together, the head does not."""
        return [self.headed(y) for y in self.backbone.each(views)]

    def headed(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The representation, and what the head makes of it."""
        z = self.projector(y)
        # a bottleneck of tiny length keeps a bounded gradient
        unit = functional.normalize(z, dim=1, eps=1e-6)
        return y, z, functional.linear(unit, functional.normalize(self.prototypes.weight, dim=1))


class DINO(Method):
    """Student and teacher."""

    config: DINOConfig
    centre: Tensor
    """c, (K,)."""

    def __init__(self, config: DINOConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.student = Network(config, backbone)
        self.teacher = momentum_copy(self.student)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.teacher_temperature = config.first_teacher_temperature
        self._means: list[Tensor] = []

    @property
    def backbone(self) -> Backbone:
        """The teacher's or the student's, as `encoder` says."""
        return cast("Network", getattr(self, self.config.encoder)).backbone

    def before_step(self, progress: Progress) -> None:
        """Set the teacher's temperature."""
        super().before_step(progress)
        config = self.config
        done = min(1.0, progress.epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
        first, last = config.first_teacher_temperature, config.teacher_temperature
        self.teacher_temperature = first + (last - first) * done

    def forward(self, views: Views) -> StepOutput:
        """DINO of two global views and any number of local ones."""
        seen = self.student.each(views)
        with torch.no_grad():
            taught = self.teacher.each(islice(views, 2))
        with torch.autocast(seen[0][2].device.type, enabled=False):
            student = [at_least_float32(output) for _, _, output in seen]
            teacher = [at_least_float32(output) for _, _, output in taught]
            self._means.append(torch.stack(teacher).mean(dim=(0, 1)))
            sharp, soft = self.teacher_temperature, self.config.temperature
            loss, entropy = (all_reduce_mean(x) for x in dino_loss(teacher, student, self.centre, sharp, soft))
            probabilities = ((teacher[0] - self.centre) / sharp).softmax(dim=1)
        kept = taught if self.config.encoder == "teacher" else seen
        terms = {"teacher_entropy": entropy, "kl": loss - entropy}
        return self.output(loss, [z for _, z, _ in seen], kept[0][0], terms, probabilities)

    def after_backward(self, progress: Progress) -> None:
        """Leave the last layer alone in the first epochs."""
        if progress.epoch < self.config.freeze_epochs:
            self.student.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the centre and the teacher."""
        mean = all_reduce_mean(torch.stack(self._means).mean(dim=0))
        self._means.clear()
        if self.config.centring:
            self.centre.lerp_(mean, 1 - self.config.centre_decay)
        follow(self.teacher, self.student, decay(self.config.momentum, progress.share))
