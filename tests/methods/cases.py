"""Small configurations of every method, for the tests that all of them must pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, MethodSettings, SupervisedConfig, VICRegConfig
from jem.distributed import rank, world
from jem.methods import Method, Progress, build_method

# zero_init would leave most of the gradient zero at the first step
CIFAR = BackboneConfig(stem="cifar", zero_init=False)
STRIDE = BackboneConfig(stem="stride2", zero_init=False)
BATCH, SIDE, LOCAL_SIDE, STEPS, CLASSES = 12, 8, 6, 3, 4


@dataclass(frozen=True)
class Case:
    """A method's settings, and what it is trained on: `STEPS` steps, each an epoch of one batch of `BATCH` images."""

    config: MethodSettings
    backbone: BackboneConfig = STRIDE
    views: int = 2
    local: int = 0
    """Local views, of `LOCAL_SIDE` pixels."""
    side: int = SIDE
    masked: bool = False
    """Half of a ViT's patches are masked in the first view."""
    gradient_at: int = 0
    """The step whose gradient is compared."""
    without_gradient: tuple[str, ...] = ()
    """Beginnings of the names of parameters that this step leaves alone."""

    def build(self) -> Method:
        """The method in float64; the same weights each time."""
        torch.manual_seed(0)
        return build_method(self.config, self.backbone, CLASSES, BATCH).double()  # type: ignore[arg-type]

    def batch(self, step: int) -> Views:
        """The global batch of a step: the same images' ids in another order, other views."""
        generator = torch.Generator().manual_seed(step)

        def view(side: int) -> Tensor:
            return torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64)

        views = [view(self.side) for _ in range(self.views)] + [view(LOCAL_SIDE) for _ in range(self.local)]
        # the labels that are missing (-1) are more on one worker than on the other
        label = torch.arange(BATCH) % CLASSES
        label[:3] = -1
        masks: list[Tensor | None] | None = None
        if self.masked:
            patches = (self.side // self.backbone.patch) ** 2
            order = torch.rand(BATCH, patches, generator=generator).argsort(dim=1)
            masks = [order < patches // 2, *([None] * (len(views) - 1))]
        return Views(views, torch.randperm(BATCH, generator=generator), label, masks)

    def step(self, learner: torch.nn.Module, method: Method, optimizer: torch.optim.Optimizer, step: int) -> Any:
        """One step as the loop makes it, of this worker's part; the output and the gradient of each parameter."""
        progress = Progress(step, STEPS, step, True, 0)
        torch.manual_seed(100 * step + rank())  # what a method draws here would differ between workers
        method.train()
        method.before_step(progress)
        out = learner(part(self.batch(step)))
        out.loss.backward()
        gradient = {
            name: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            for name, p in method.named_parameters()
            if p.requires_grad
        }
        method.after_backward(progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(step + 1, STEPS, step, True, 0))
        return out, gradient


def part(whole: Views) -> Views:
    """This worker's part of a global batch."""

    def own(x: Tensor) -> Tensor:
        return x.chunk(world())[rank()]

    masks = None if whole.masks is None else [None if mask is None else own(mask) for mask in whole.masks]
    return Views([own(view) for view in whole.views], own(whole.id), own(whole.label), masks)


CASES: dict[str, Case] = {
    "vicreg": Case(VICRegConfig(expander=(16, 8))),
    "vicreg, embedding wider than the batch": Case(VICRegConfig(expander=(16, 32))),
    "vicreg, separate branches": Case(VICRegConfig(expander=(16, 8), branches="separate")),
    "vicreg, two architectures": Case(VICRegConfig(expander=(16, 8), branches=(STRIDE, CIFAR))),
    "vicreg, hinge on the variance": Case(VICRegConfig(expander=(16, 8), hinge="variance")),
    "supervised": Case(SupervisedConfig(label_smoothing=0.1)),
}
