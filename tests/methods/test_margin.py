"""The margin loss is its definition: positives are drawn together, negatives pushed a margin apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from jem.batch import Views
from jem.config import BackboneConfig, MarginConfig, PretrainConfig
from jem.methods import build_method
from jem.methods.margin import Margin, margin_loss

SMALL = BackboneConfig(stem="stride2")


def brute_force(z1: np.ndarray, z2: np.ndarray, margin: float) -> tuple[float, float]:
    """The means over positive and over negative pairs, one pair at a time."""
    positive = [0.5 * np.linalg.norm(a - b) ** 2 for a, b in zip(z1, z2, strict=True)]
    views = [(i, row) for view in (z1, z2) for i, row in enumerate(view)]
    negative = [
        0.5 * max(0.0, margin - float(np.linalg.norm(a - b))) ** 2 for i, a in views for j, b in views if i != j
    ]
    return float(np.mean(positive)), float(np.mean(negative))


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    first = 0.5 * rng.normal(size=(n, d))
    return torch.from_numpy(first), torch.from_numpy(first + 0.3 * rng.normal(size=(n, d)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 8), d=st.integers(1, 6), margin=st.floats(0.1, 4), seed=st.integers(0, 99))
def test_loss_is_its_definition(n: int, d: int, margin: float, seed: int) -> None:
    z1, z2 = embeddings(n, d, seed)
    loss, terms = margin_loss(z1, z2, margin)
    positive, negative = brute_force(z1.numpy(), z2.numpy(), margin)
    assert terms["positive"].item() == pytest.approx(positive, rel=1e-10)
    assert terms["negative"].item() == pytest.approx(negative, rel=1e-6, abs=1e-12)
    assert loss.item() == pytest.approx(positive + negative, rel=1e-6)


def test_gradient_is_that_of_the_loss() -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(5, 3))
    assert torch.autograd.gradcheck(lambda a, b: margin_loss(a, b, 1.5)[0], (z1, z2))


def test_a_negative_costs_nothing_from_the_margin_on() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert margin_loss(z, z, 1.0)[0].item() == pytest.approx(0, abs=1e-6)
    assert margin_loss(z, z, 1.5)[0].item() == pytest.approx(0.125)


def test_a_collapse_costs_the_margin_and_its_gradient_is_finite() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    loss, _ = margin_loss(z, z, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(2.0, rel=1e-5)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("normalise", [True, False])
def test_output_is_the_loss_of_the_embeddings_in_float32(normalise: bool) -> None:
    torch.manual_seed(0)
    method = build_method(MarginConfig(projector=(16, 8), normalise=normalise), SMALL)
    assert isinstance(method, Margin)
    generator = torch.Generator().manual_seed(0)
    given = Views([torch.randn(6, 3, 12, 12, generator=generator) for _ in range(2)], torch.arange(6), torch.zeros(6))
    with torch.autocast("cpu", torch.bfloat16):
        out = method(given)
        y1, z1 = method.branch(given.views[0])
        _, z2 = method.branch(given.views[1])
    each = [z.detach().double() for z in (z1, z2)]
    each = [functional.normalize(z, dim=1) for z in each] if normalise else each
    expected = brute_force(each[0].numpy(), each[1].numpy(), 1.0)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(sum(expected), rel=1e-4)
    assert torch.equal(out.embedding, z1.float())
    assert torch.equal(out.representation, y1.float())


@pytest.mark.parametrize(
    ("method", "train", "words"),
    [
        ({}, {"batch_size": 1}, "leaves 1 image and no negative: Margin loss needs at least 2"),
        ({"margin": 2.5}, {}, r"margin 2.5 cannot be reached: .* at most 2 apart; lower it, or set method.normalise"),
    ],
)
def test_what_cannot_work_is_refused(method: dict, train: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate({"data": "x", "method": {"name": "margin", **method}, "train": train})
