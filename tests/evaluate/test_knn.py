"""kNN against scikit-learn and a brute-force transcription of the vote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from jem.errors import InputError, RunError
from jem.evaluate import knn
from jem.evaluate.knn import knn_accuracy


def brute_force(
    bank: NDArray[np.float64],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float64],
    query_labels: NDArray[np.int64],
    k: int,
    temperature: float,
    leave_one_out: bool = False,
) -> float:
    """Vote by vote, in float64, from the paper's sentence."""
    hits = 0
    for i, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        similarities = [
            (float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)), int(bank_labels[j]))
            for j, row in enumerate(bank)
            if not (leave_one_out and i == j)
        ]
        votes: dict[int, float] = {}
        for similarity, vote in sorted(similarities, reverse=True)[:k]:
            votes[vote] = votes.get(vote, 0.0) + np.exp(similarity / temperature)
        hits += max(votes, key=lambda c: votes[c]) == label
    return hits / len(queries)


def features(rows: int, dim: int, classes: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    return rng.normal(size=(classes, dim))[labels] + rng.normal(size=(rows, dim)), labels


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 60),
    dim=st.integers(2, 9),
    classes=st.integers(1, 5),
    k=st.integers(1, 80),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    leave_one_out=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_vote_is_the_papers(
    rows: int, dim: int, classes: int, k: int, temperature: float, leave_one_out: bool, seed: int
) -> None:
    bank, labels = features(rows, dim, classes, seed)
    queries, query_labels = (bank, labels) if leave_one_out else features(20, dim, classes, seed + 1)
    expected = brute_force(bank, labels, queries, query_labels, k, temperature, leave_one_out)
    found = knn_accuracy(
        torch.tensor(bank),
        torch.tensor(labels),
        torch.tensor(queries),
        torch.tensor(query_labels),
        k,
        temperature,
        leave_one_out=leave_one_out,
    )
    assert found == pytest.approx(expected)


def test_agrees_with_scikit_learn_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = load_digits(return_X_y=True)
    train, test, k, temperature = slice(0, 1200), slice(1200, None), 50, 0.1
    judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = judge.fit(x[train], y[train]).score(x[test], y[test])
    monkeypatch.setattr(knn, "_SIMILARITIES", 1200 * 7)  # many blocks, the last one short
    tensors = [torch.tensor(part) for part in (x[train], y[train], x[test], y[test])]
    assert knn_accuracy(*tensors, k, temperature) == pytest.approx(expected)
    assert expected > 0.9


def test_leave_one_out_does_not_see_itself_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = torch.randn(90, 64, generator=torch.Generator().manual_seed(0)), torch.arange(90)
    monkeypatch.setattr(knn, "_SIMILARITIES", 90 * 40)
    assert knn_accuracy(rows, labels, rows, labels, 1) == 1.0
    assert knn_accuracy(rows, labels, rows, labels, 1, leave_one_out=True) == 0.0


def test_a_small_temperature_does_not_overflow() -> None:
    bank, labels = (torch.tensor(part) for part in features(50, 4, 3, 0))
    nearest = knn_accuracy(bank, labels, bank + 0.3, labels, 1)
    assert knn_accuracy(bank, labels, bank + 0.3, labels, 50, 1e-4) == nearest


def test_class_that_the_bank_lacks_is_missed() -> None:
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7])) == 0.5


@pytest.mark.parametrize(
    ("bank", "labels", "error", "words"),
    [
        (torch.eye(3), torch.tensor([0, -1, 1]), InputError, "without a label"),
        (torch.eye(3), torch.tensor([0, 1]), InputError, "features"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), InputError, "features"),
        (torch.eye(3) * torch.nan, torch.tensor([0, 1, 2]), RunError, "not finite"),
        (torch.eye(4), torch.arange(4), InputError, "dimensions"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    bank: torch.Tensor, labels: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        knn_accuracy(bank, labels, torch.eye(3), torch.arange(3))
