"""The supervised baseline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jem.batch import Views
from jem.config import BackboneConfig, SupervisedConfig
from jem.errors import InputError
from jem.methods import build_method
from jem.methods.supervised import cross_entropy

SMALL = BackboneConfig(stem="stride2")


def test_cross_entropy_is_its_definition_over_the_labelled_images() -> None:
    rng = np.random.default_rng(0)
    logits, labels, smoothing = rng.normal(size=(7, 5)), np.array([0, 4, -1, 2, 2, -1, 1]), 0.1
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            log_p = row - np.log(np.exp(row).sum())
            losses.append(-(1 - smoothing) * log_p[label] - smoothing * log_p.mean())
    found = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), smoothing)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_loss_is_the_mean_over_the_views(count: int) -> None:
    torch.manual_seed(0)
    method = build_method(SupervisedConfig(), SMALL, 3).eval()
    views = [torch.randn(4, 3, 16, 16) for _ in range(count)]
    label = torch.tensor([0, 2, -1, 1])
    out = method(Views(views, torch.arange(4), label))
    logits = [method.classifier(method.backbone(view)) for view in views]
    expected = sum(cross_entropy(each, label).item() for each in logits) / count
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    predicted = logits[0].argmax(dim=1)
    assert out.terms["accuracy"].item() == pytest.approx((predicted == label).sum().item() / 3)
    assert torch.equal(out.embedding, logits[0])
    assert out.representation.shape == (4, 512)
    assert not out.embedding.requires_grad


def test_a_batch_without_a_label_costs_nothing_and_moves_nothing() -> None:
    torch.manual_seed(0)
    method = build_method(SupervisedConfig(label_smoothing=0.1), SMALL, 3)
    out = method(Views([torch.randn(4, 3, 8, 8)], torch.arange(4), torch.full((4,), -1)))
    out.loss.backward()
    assert out.loss.item() == 0
    assert {name: term.item() for name, term in out.terms.items()} == {"cross_entropy": 0, "accuracy": 0}
    # DDP waits for every parameter's gradient
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in method.parameters())


def test_it_learns_its_batch() -> None:
    torch.manual_seed(0)
    method = build_method(SupervisedConfig(), SMALL, 2)
    views = Views([torch.randn(16, 3, 8, 8)], torch.arange(16), torch.arange(16) % 2)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        method(views).loss.backward()
        optimizer.step()
    assert method(views).terms["accuracy"] == 1


@pytest.mark.parametrize("classes", [None, 0])
def test_it_is_refused_without_labels(classes: int | None) -> None:
    with pytest.raises(InputError, match="needs labels"):
        build_method(SupervisedConfig(), SMALL, classes)
