"""kNN accuracy during training: a small sample of labelled images, kept decoded, and judged by all workers together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jem import distributed
from jem.batch import Batch
from jem.config import PretrainConfig
from jem.data.index import Index
from jem.data.read import read_rows
from jem.encoder import Encoder
from jem.evaluate.knn import knn_accuracy
from jem.methods.base import Method


def encoder_of(method: Method, config: PretrainConfig) -> Encoder:
    """The encoder that `method` has learned: it shares the backbone's weights."""
    backbone = method.backbone
    augment = config.augment
    return Encoder(backbone, backbone.config, augment.views[0].size, augment.mean, augment.std)


@dataclass(frozen=True)
class Sample:
    """This worker's part of a sample of a data set."""

    batch: Batch
    rows: int
    """Of the whole sample; the last workers' parts may be padded with repetitions."""

    @classmethod
    def read(cls, index: Index, rows: int, config: PretrainConfig, device: torch.device) -> Sample:
        """Read every world-th row of `rows` evenly spaced ones, beginning with this worker's rank."""
        rows = min(rows, len(index))
        positions = np.linspace(0, len(index) - 1, rows).astype(np.int64)
        world = distributed.world()
        mine = np.resize(positions, -(-rows // world) * world)[distributed.rank() :: world]
        batch = read_rows(index, mine, config.stream.canvas, config.stream.pixel_limit, replace=True)
        return cls(Batch(batch.image.to(device), batch.size, batch.id, batch.label.to(device)), rows)

    @torch.no_grad()
    def features(self, encoder: Encoder, batch_size: int) -> tuple[Tensor, Tensor]:
        """Features (M, D) and labels (M,) of the whole sample, the same on every worker."""
        parts = [
            encoder(self.batch.image[low : low + batch_size], self.batch.size[low : low + batch_size]).float()
            for low in range(0, len(self.batch), batch_size)
        ]
        return self._whole(torch.cat(parts)), self._whole(self.batch.label)

    def _whole(self, mine: Tensor) -> Tensor:
        everyone = distributed.gather(mine)
        by_rank = everyone.view(distributed.world(), -1, *everyone.shape[1:])
        return by_rank.transpose(0, 1).flatten(0, 1)[: self.rows]


class OnlineKNN:
    """Judges a method by the kNN accuracy of its encoder's features.

    The bank is a sample of the training set; the queries are one of the test set, or, without a test set, the bank
    itself, each image without its own vote.
    """

    def __init__(self, config: PretrainConfig, index: Index, test: Index | None, device: torch.device) -> None:
        online = config.evaluation.online
        assert online is not None
        self._config, self._device = config, device
        self._bank = Sample.read(index, online.bank, config, device)
        self._queries = Sample.read(test, online.queries, config, device) if test is not None else None

    def __call__(self, method: Method) -> dict[str, float]:
        """`knn`, in [0, 1]. All workers call it together; the method is in evaluation mode meanwhile."""
        knn, batch_size = self._config.evaluation.knn, self._config.evaluation.batch_size
        method.eval()
        encoder = encoder_of(method, self._config).to(self._device).eval()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.train.precision == "bf16"):
            bank, labels = self._bank.features(encoder, batch_size)
            queries = (bank, labels) if self._queries is None else self._queries.features(encoder, batch_size)
        method.train()
        accuracy = knn_accuracy(
            bank, labels, *queries, k=knn.k, temperature=knn.temperature, leave_one_out=self._queries is None
        )
        return {"knn": accuracy}
