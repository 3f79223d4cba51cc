"""What every method is: a module from the views of a batch to a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from jem.distributed import gather, rank, world
from jem.methods.regularisers import covariance, variance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jem.batch import Views
    from jem.config import MethodSettings
    from jem.models.backbones import Backbone


@dataclass(frozen=True)
class StepOutput:
    """Result of one forward pass. Tensors other than `loss` are detached."""

    loss: Tensor
    """Scalar, float32 or wider, of the *global* batch: the same on every worker."""
    embedding: Tensor
    """(n, d), this worker's embeddings of the first view, for the diagnostics."""
    representation: Tensor
    """(n, D), this worker's representations of the first view."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Named parts of the loss, unweighted scalars, for the log."""
    assignment: Tensor | None = None
    """(n, K), this worker's probabilities of the first view over K clusters, where a method has them. Once they are the
    same for all images it has collapsed, though the embeddings may differ."""


@dataclass(frozen=True)
class Progress:
    """Where the training is. The same on every worker."""

    step: int = 0
    """Optimizer steps done."""
    total: int = 1
    """Optimizer steps in the whole training."""
    epoch: int = 0
    """Of the step that is about to begin or has just been done, from 0."""
    first: bool = True
    """Whether that step is its epoch's first."""
    seed: int = 0
    """The run's."""

    @property
    def share(self) -> float:
        """Share of the training that is done, 0 to 1."""
        return self.step / self.total

    def generator(self) -> torch.Generator:
        """A generator for what a method draws in this step: on the CPU, the same on every worker."""
        words = np.random.SeedSequence([self.seed, self.step, 1]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Method(nn.Module, ABC):
    """One joint embedding method: networks, heads and loss.

    All state is in parameters and buffers, so a state dictionary is complete. The loop wraps the method in
    `DistributedDataParallel`. One step is `before_step`, then `forward` on this worker's views (several times if
    `train.accumulate` is) and the backward pass, `after_backward`, the optimizer's step, and `after_step`. What a
    forward pass leaves for `after_step` (keys for the queue, a mean for the centre) is kept in attributes that are no
    state: no checkpoint is written in between.

    A step does not wait for the device: what is drawn on the CPU gets there by `jem.device.put`, nothing is chosen by a
    boolean mask, and no tensor is turned into a number (`tests/train/test_no_wait.py` names the exceptions).
    """

    def __init__(self, config: MethodSettings) -> None:
        super().__init__()
        self.config = config
        self.generator = Progress().generator()
        """Of this step: on the CPU, the same on every worker."""

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The network that is kept."""

    @abstractmethod
    def forward(self, views: Views) -> StepOutput:
        """Loss of the global batch, from this worker's part of it."""

    def before_step(self, progress: Progress) -> None:
        """Prepare the step number `progress.step` (from 0). An override calls this one first."""
        self.generator = progress.generator()

    def after_backward(self, progress: Progress) -> None:
        """Change gradients before the optimizer sees them; `progress` as in `before_step`.

        A parameter whose `grad` is set to None is not moved at all.
        """

    def after_step(self, progress: Progress) -> None:
        """Do what follows the optimizer step (EMA, queue, prototypes); `progress.step` counts this step too."""

    def constant_rate(self) -> Iterable[nn.Module]:
        """The parts whose learning rate does not follow the schedule but stays at its highest value."""
        return ()

    def representation(self, images: Tensor) -> Tensor:
        """Normalised images, float (N, 3, H, W), to (N, D): what evaluation and the registered encoder use."""
        return cast("Tensor", self.backbone(images))

    def output(
        self,
        loss: Tensor,
        embeddings: Sequence[Tensor],
        representation: Tensor,
        terms: dict[str, Tensor],
        assignment: Tensor | None = None,
    ) -> StepOutput:
        """The step's result, with the variance and covariance terms added where `config.regularise` asks for them.

        Args:
            loss: scalar, of the global batch.
            embeddings: this worker's, of each view, (n, d), with their gradient; the first is for the diagnostics.
            representation: this worker's, of the first view, (n, D).
            terms: named parts of the loss.
            assignment: as `StepOutput`'s.
        """
        regularise = getattr(self.config, "regularise", None)
        if regularise is not None:
            with torch.autocast(loss.device.type, enabled=False):
                every = [everyones(z) for z in embeddings]
                # as VICReg's: the mean over the views of v, the sum of c
                v = torch.stack([variance(z) for z in every]).mean()
                c = torch.stack([covariance(z) for z in every]).sum()
                loss = loss + regularise.mu * v + regularise.nu * c
            terms = terms | {"variance": v, "covariance": c}
        return StepOutput(
            loss,
            embedding=at_least_float32(embeddings[0].detach()),
            representation=at_least_float32(representation.detach()),
            terms={name: term.detach() for name, term in terms.items()},
            assignment=None if assignment is None else assignment.detach(),
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision tensors to float32, leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def everyones(x: Tensor) -> Tensor:
    """The global batch, (N, ...), of this worker's part of it, (n, ...), in float32 or wider, with its gradient."""
    return gather(at_least_float32(x))


def mine(x: Tensor) -> Tensor:
    """This worker's part, (n, ...), of what is known for the global batch, (N, ...)."""
    return x.chunk(world())[rank()]
