"""The linear probe against scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jem.config import ProbeConfig
from jem.errors import InputError
from jem.evaluate import probe
from jem.evaluate.probe import linear_probe

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> Split:
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    x = x @ rng.normal(size=(64, 64)) + 5  # mixed and shifted, so that standardising matters
    order = rng.permutation(len(x))
    train, test = order[:600], order[600:]
    return torch.tensor(x[train]), torch.tensor(y[train]), torch.tensor(x[test]), torch.tensor(y[test])


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_solution_is_scikit_learns(digits: Split, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, test_labels = digits
    monkeypatch.setattr(probe, "_LOGITS", 2500)  # several blocks of rows
    result = linear_probe(*digits, ProbeConfig(weight_decays=(decay,), max_iterations=1000))
    scale = StandardScaler().fit(train)
    expected = LogisticRegression(C=1 / (len(train) * decay), max_iter=5000, tol=1e-8)
    expected.fit(scale.transform(train), labels)
    assert result.accuracy == pytest.approx(expected.score(scale.transform(test), test_labels), abs=1.5 / len(test))
    assert result.train_accuracy == pytest.approx(expected.score(scale.transform(train), labels), abs=1.5 / len(train))
    standard = tuple(torch.tensor(scale.transform(part)) for part in (train, test))
    for ours, theirs in zip(probe._standardise(train, test), standard, strict=True):
        torch.testing.assert_close(ours, theirs)
    weight, bias, _ = probe._fit(
        standard[0], labels, torch.zeros(10, 64).double(), torch.zeros(10).double(), decay, 1000
    )
    np.testing.assert_allclose(weight, expected.coef_, atol=5e-3)
    np.testing.assert_allclose(bias - bias.mean(), expected.intercept_ - expected.intercept_.mean(), atol=5e-3)


def test_weight_decay_is_chosen_on_the_held_out_tenth(digits: Split) -> None:
    decays = (1e-8, 1e-2, 1e3)
    result = linear_probe(*digits, ProbeConfig(weight_decays=decays), seed=3)
    assert set(result.validation) == set(decays)
    assert result.validation[result.weight_decay] == max(result.validation.values())
    assert result.weight_decay != 1e3  # so strong that only the most frequent class is left
    assert result.accuracy > 0.9
    alone = linear_probe(*digits, ProbeConfig(weight_decays=(result.weight_decay,)))
    assert alone.accuracy == pytest.approx(result.accuracy, abs=0.01)
    assert alone.validation == {}


def test_same_seed_gives_the_same_result(digits: Split) -> None:
    assert linear_probe(*digits, seed=1) == linear_probe(*digits, seed=1)


def test_single_precision_is_enough(digits: Split) -> None:
    train, labels, test, test_labels = digits
    single = linear_probe(train.float(), labels, test.float(), test_labels)
    assert single.accuracy == pytest.approx(linear_probe(*digits).accuracy, abs=0.01)


def test_constant_dimensions_do_no_harm(digits: Split) -> None:
    train, labels, test, test_labels = digits
    noise = 7 + 1e-7 * torch.randn(len(train), 5, generator=torch.Generator().manual_seed(0))
    dead = torch.zeros(len(train), 3)
    wide = torch.cat([train.float(), noise, dead], dim=1)
    wide_test = torch.cat([test.float(), torch.full((len(test), 5), 9.0), torch.ones(len(test), 3)], dim=1)
    found = linear_probe(wide, labels, wide_test, test_labels)
    assert found.accuracy == pytest.approx(
        linear_probe(train.float(), labels, test.float(), test_labels).accuracy, abs=0.01
    )


def test_two_images_are_enough_and_one_is_refused() -> None:
    eye, labels = torch.eye(2), torch.tensor([0, 1])
    assert linear_probe(eye, labels, eye, labels, ProbeConfig(weight_decays=(1e-4,))).accuracy == 1.0
    linear_probe(eye, labels, eye, labels)
    with pytest.raises(InputError, match="2 training images"):
        linear_probe(eye[:1], labels[:1], eye, labels)


def test_unlabelled_sets_are_refused() -> None:
    eye = torch.eye(3)
    with pytest.raises(InputError, match="without a label"):
        linear_probe(eye, torch.tensor([-1, -1, -1]), eye, torch.arange(3))
