"""Weighted k-nearest-neighbour classification of frozen features: no training, so a quick judge of an encoder.

Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from jem.errors import InputError, RunError

_SIMILARITIES = 1 << 24
"""How many similarities are held at once: 64 MB in float32."""


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    *,
    leave_one_out: bool = False,
) -> float:
    """Share of the queries whose k nearest images in the bank vote for the right class.

    A neighbour with cosine similarity s votes with weight exp(s / temperature).

    Args:
        bank: float (M, D), the labelled features that vote.
        bank_labels: int64 (M,), 0 or greater.
        queries: float (Q, D), the features to classify.
        query_labels: int64 (Q,), 0 or greater; a class that the bank lacks counts as missed.
        k: neighbours that vote; all of the bank where it has fewer.
        temperature: greater than 0; the smaller, the more the nearest neighbours count.
        leave_one_out: `queries` are the rows of `bank`, and no row votes for itself.

    Returns:
        Accuracy in [0, 1].

    Raises:
        InputError: no features, a missing label, or shapes that do not belong together.
        RunError: a feature is not finite.
    """
    check_features(bank, bank_labels, "the bank")
    check_features(queries, query_labels, "the queries")
    if bank.shape[1] != queries.shape[1]:
        raise InputError(
            f"the bank has {bank.shape[1]} dimensions and the queries {queries.shape[1]}: use features of one encoder"
        )
    if leave_one_out and (len(bank) != len(queries) or len(bank) < 2):
        raise InputError(f"leave-one-out needs the same 2 or more rows twice, not {len(bank)} and {len(queries)}")
    if k < 1 or temperature <= 0:
        raise InputError(f"k {k} and temperature {temperature} must be greater than 0")

    bank, queries = functional.normalize(bank.float(), dim=1), functional.normalize(queries.float(), dim=1)
    bank_labels = bank_labels.to(bank.device)
    query_labels = query_labels.to(bank.device)
    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    k = min(k, len(bank) - leave_one_out)
    rows = max(1, _SIMILARITIES // max(len(bank), classes))
    hits = 0
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ bank.T
        if leave_one_out:
            row = torch.arange(len(similarity), device=bank.device)
            similarity[row, row + start] = -torch.inf
        nearest, index = similarity.topk(k, dim=1)
        # Weights relative to the nearest neighbour's: the same votes, and no overflow at a small temperature.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(similarity), classes).scatter_add_(1, bank_labels[index], weights)
        hits += int((votes.argmax(dim=1) == query_labels[start : start + rows]).sum())
    return hits / len(queries)


def check_features(features: Tensor, labels: Tensor, name: str) -> None:
    """Refuse features and labels that cannot be judged.

    Args:
        features: float (N, D).
        labels: int64 (N,).
        name: what they are, for the message.

    Raises:
        InputError: no rows, a missing label, or shapes that do not belong together.
        RunError: a feature is not finite.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise InputError(
            f"{name} has features {tuple(features.shape)} and labels {tuple(labels.shape)}: give (N, D) and (N,), N > 0"
        )
    if int(labels.min()) < 0:
        raise InputError(f"{name} has images without a label: judge with a labelled data set")
    if not bool(torch.isfinite(features).all()):
        raise RunError(f"{name} has features that are not finite: the encoder has diverged")
