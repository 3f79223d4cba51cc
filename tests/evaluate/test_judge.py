"""All figures in one call."""

from __future__ import annotations

import pytest
import torch

from jem.config import EvaluationSettings, KNNConfig
from jem.errors import InputError
from jem.evaluate.collapse import embedding_health
from jem.evaluate.judge import Features, hold_out, judge
from jem.evaluate.knn import knn_accuracy
from jem.evaluate.probe import linear_probe


def features(rows: int, seed: int, *, labelled: bool = True, first: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    x = torch.nn.functional.one_hot(labels, 8) * 2.0 + torch.randn(rows, 8, generator=generator)
    return Features(x, labels if labelled else torch.full((rows,), -1), torch.arange(first, first + rows))


def test_figures_are_those_of_the_parts() -> None:
    train, test = features(300, 0), features(100, 1)
    settings = EvaluationSettings(knn=KNNConfig(k=15, temperature=0.2))
    found = judge(train, test, settings, seed=4)
    parts = (train.features, train.labels, test.features, test.labels)
    assert found["knn"] == knn_accuracy(*parts, 15, 0.2)
    assert found["linear"] == linear_probe(*parts, settings.probe, 4).accuracy
    health = embedding_health(test.features)
    assert found["rankme"] == pytest.approx(health.rankme)
    assert found["correlation"] == pytest.approx(health.correlation)
    assert set(found) == {"knn", "linear", "std", "spread", "rankme", "correlation"}


def test_probe_can_be_left_out() -> None:
    assert "linear" not in judge(features(50, 0), features(20, 1), EvaluationSettings(probe=None))


def test_without_labels_the_spread_is_still_measured() -> None:
    found = judge(features(50, 0), features(20, 1, labelled=False), EvaluationSettings())
    assert set(found) == {"std", "spread", "rankme", "correlation"}


def test_without_a_test_set_a_fifth_is_held_out() -> None:
    train = features(200, 0)
    found = judge(train, None, EvaluationSettings(), seed=1)
    assert 0.4 < found["knn"] < 1.0  # an image in its own bank would make it 1.0
    rest, fifth = hold_out(train, 1)
    assert len(fifth) == 40
    assert sorted(torch.cat([rest.ids, fifth.ids]).tolist()) == train.ids.tolist()
    again = hold_out(train, 1)[1]
    assert torch.equal(fifth.ids, again.ids)
    assert not torch.equal(fifth.ids, hold_out(train, 2)[1].ids)
    assert torch.equal(train.labels[fifth.ids], fifth.labels)


def test_too_few_images_to_hold_some_out_are_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        judge(features(9, 0), None, EvaluationSettings())
