"""All figures that an encoder's features are judged by, in one call: pretraining, evaluation and demo use the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jem.errors import InputError
from jem.evaluate.collapse import embedding_health
from jem.evaluate.knn import knn_accuracy
from jem.evaluate.probe import linear_probe

if TYPE_CHECKING:
    from jem.config import EvaluationSettings

HEALTH_ROWS = 10_000
"""Images, at most, on which the spread of the features is measured."""
HELD_OUT = 0.2
"""Share of the training images that is judged where there is no test set."""


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a data set."""

    features: Tensor
    """float32 (N, D)."""
    labels: Tensor
    """int64 (N,), -1 where there is none."""
    ids: Tensor
    """int64 (N,), ascending."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return len(self) > 0 and int(self.labels.min()) >= 0

    def rows(self, which: Tensor) -> Features:
        """The given rows, by position."""
        return Features(self.features[which], self.labels[which], self.ids[which])


def judge(
    train: Features,
    test: Features | None,
    settings: EvaluationSettings,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Judge features that one encoder made of a training and a test set.

    Args:
        train: the bank of the kNN and the training set of the probe.
        test: the images to classify; None holds out a fifth of `train`.
        settings: of kNN and probe; `probe` None leaves the probe out.
        seed: of the held-out parts.
        device: where it is computed.

    Returns:
        `knn` and `linear`, accuracies in [0, 1], where both sets have labels; `std`, `spread`, `rankme` and
        `correlation` of the test features (see `jem.evaluate.collapse.Health`) in any case.

    Raises:
        InputError: too few images.
        RunError: a feature is not finite.
    """
    if test is None:
        train, test = hold_out(train, seed)
    bank, queries = train.features.to(device), test.features.to(device)
    figures: dict[str, float] = {}
    if train.labelled and test.labelled:
        knn = settings.knn
        figures["knn"] = knn_accuracy(bank, train.labels, queries, test.labels, knn.k, knn.temperature)
        if settings.probe is not None:
            figures["linear"] = linear_probe(bank, train.labels, queries, test.labels, settings.probe, seed).accuracy
    health = embedding_health(queries[_some(len(test), HEALTH_ROWS, seed).to(device)])
    return figures | {name: getattr(health, name) for name in ("std", "spread", "rankme", "correlation")}


def hold_out(features: Features, seed: int) -> tuple[Features, Features]:
    """Split off a fifth at random: (the rest, the fifth).

    Raises:
        InputError: fewer than 10 images.
    """
    if len(features) < 10:
        raise InputError(f"{len(features)} images are too few to hold some out: give a test set, or 10 images or more")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    count = int(HELD_OUT * len(features))
    return features.rows(order[count:].sort().values), features.rows(order[:count].sort().values)


def _some(count: int, most: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
