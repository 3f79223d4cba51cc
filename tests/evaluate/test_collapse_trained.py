"""The verdict on real trainings: VICReg on digits, with each of its terms left out in turn."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from jem.augment.views import Augment, generator
from jem.batch import Batch
from jem.config import AugmentConfig, BackboneConfig, VICRegConfig, ViewConfig
from jem.evaluate.collapse import embedding_health, verdict
from jem.methods import build_method

BATCH = 64
"""28 steps are an epoch."""


def kinds(steps: int, *, mu: float, nu: float) -> list[int]:
    """The verdict on each step's embedding."""
    torch.manual_seed(0)
    grey = functional.interpolate(torch.tensor(load_digits().images, dtype=torch.float32)[:, None], 32, mode="bilinear")
    images = (grey / 16 * 255).byte().expand(-1, 3, -1, -1)
    augment = Augment(AugmentConfig(views=(ViewConfig(count=2, size=32, scale=(0.3, 1.0), flip=0, grey=0),)))
    method = build_method(VICRegConfig(mu=mu, nu=nu, expander=(512, 512, 512)), BackboneConfig(), None).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    order = torch.randperm(len(images))
    found = []
    for step in range(steps):
        rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        batch = Batch(images[rows], torch.full((BATCH, 2), 32), rows, rows)
        output = method(augment(batch, generator(0, 0, step, 0)))
        found.append(verdict(embedding_health(output.embedding)).kind)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return found


def test_default_is_never_called_collapsed_not_even_in_its_first_steps() -> None:
    assert set(kinds(30, mu=25, nu=1)) == {0}


@pytest.mark.parametrize(("mu", "nu", "kind", "steps"), [(0, 1, 1, 28), (25, 0, 2, 42)])
def test_leaving_a_term_out_is_called_by_its_name_in_the_first_two_epochs(
    mu: float, nu: float, kind: int, steps: int
) -> None:
    found = kinds(steps, mu=mu, nu=nu)
    assert found[0] == 0
    assert found[-6:].count(kind) >= 5
    assert set(found) == {0, kind}
