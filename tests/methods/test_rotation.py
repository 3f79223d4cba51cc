"""Rotation prediction: the images are turned, and the turn is what is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jem.batch import Views
from jem.config import BackboneConfig, RotationConfig
from jem.methods import Progress, build_method
from jem.methods.rotation import Rotation, rotated

SMALL = BackboneConfig(stem="stride2")


def batch(n: int = 6) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views([torch.randn(n, 3, 12, 12, generator=generator)], torch.arange(n), torch.full((n,), -1))


def make(**fields: object) -> Rotation:
    torch.manual_seed(0)
    method = build_method(RotationConfig(**fields), SMALL)
    assert isinstance(method, Rotation)
    return method


def test_each_image_is_turned_by_its_own_quarters() -> None:
    images = batch(8).views[0]
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    for image, turn, found in zip(images, turns, rotated(images, turns), strict=True):
        expected = np.rot90(image.numpy(), int(turn), axes=(1, 2))
        np.testing.assert_array_equal(found.numpy(), expected)


def test_loss_is_the_mean_cross_entropy_of_all_four_rotations() -> None:
    method, given = make(), batch()
    out = method(given)
    every = torch.cat([torch.rot90(given.views[0], k, (2, 3)) for k in range(4)])
    y = method.backbone(every)
    logits = method.classifier(y).detach().double().numpy()
    costs, right = [], 0
    for number, row in enumerate(logits):
        truth = number // 6
        costs.append(np.log(np.exp(row).sum()) - row[truth])
        right += row.argmax() == truth
    assert out.loss.item() == pytest.approx(np.mean(costs), rel=1e-5)
    assert out.terms["accuracy"].item() == pytest.approx(right / 24)
    assert torch.equal(out.embedding, y[:6])
    assert torch.equal(out.representation, y[:6])


def test_a_random_rotation_is_drawn_for_each_image_of_the_step() -> None:
    method, given = make(rotations="random"), batch(40)
    method.before_step(Progress(step=3, total=9))
    out = method(given)
    turns = torch.randint(4, (40,), generator=Progress(step=3, total=9).generator())
    assert set(turns.tolist()) == {0, 1, 2, 3}
    y = method.backbone(rotated(given.views[0], turns))
    expected = torch.nn.functional.cross_entropy(method.classifier(y), turns)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.representation.shape == (40, 512)


def test_it_learns_which_way_up_its_batch_is() -> None:
    method = make()
    images = batch(8).views[0] * 0.1 + torch.linspace(-1, 1, 12)[:, None]  # lighter below
    given = Views([images], torch.arange(8), torch.full((8,), -1))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        method(given).loss.backward()
        optimizer.step()
    assert method(given).terms["accuracy"] == 1
