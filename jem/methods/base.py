"""What every method is: a module from the views of a batch to a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jem.batch import Views
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


class Method(nn.Module, ABC):
    """One joint embedding method: networks, heads and loss.

    All state is in parameters and buffers, so a state dictionary is complete. The learner wraps the method in
    `DistributedDataParallel`, calls it on this worker's views, and calls `after_step` once the optimizer has moved.
    """

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The network that is kept."""

    @abstractmethod
    def forward(self, views: Views) -> StepOutput:
        """Loss of the global batch, from this worker's part of it."""

    def after_step(self, progress: float) -> None:
        """Do what follows the optimizer step (EMA, queue, prototypes); `progress` runs from 0 to 1 in the training."""

    def representation(self, images: Tensor) -> Tensor:
        """Normalised images, float (N, 3, H, W), to (N, D): what evaluation and the registered encoder use."""
        return cast("Tensor", self.backbone(images))


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision tensors to float32, leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
