"""The triplet loss is its definition, over all negatives of the batch or the hardest ones."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, TripletConfig
from jem.methods import build_method
from jem.methods.triplet import Triplet, squared_distances, triplet_loss

SMALL = BackboneConfig(stem="stride2")


def brute_force(z1: np.ndarray, z2: np.ndarray, margin: float, distance: str, negatives: str) -> tuple[float, float]:
    """Loss and share of violations, one triplet at a time."""

    def d(a: np.ndarray, b: np.ndarray) -> float:
        if distance == "euclidean":
            return float(((a - b) ** 2).sum())
        return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    views, costs, violations = (z1, z2), [], []
    for i in range(len(z1)):
        for own in (0, 1):
            anchor = views[own][i]
            positive = d(anchor, views[1 - own][i])
            others = [d(anchor, view[j]) for view in views for j in range(len(z1)) if j != i]
            for other in others if negatives == "all" else [min(others)]:
                costs.append(max(0.0, positive - other + margin))
                violations.append(positive - other + margin > 0)
    return float(np.mean(costs)), float(np.mean(violations))


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(n, d))
    return torch.from_numpy(first), torch.from_numpy(first + 0.7 * rng.normal(size=(n, d)))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 8),
    d=st.integers(1, 6),
    margin=st.floats(0.1, 2),
    distance=st.sampled_from(["cosine", "euclidean"]),
    negatives=st.sampled_from(["all", "hardest"]),
    seed=st.integers(0, 99),
)
def test_loss_is_its_definition(
    n: int,
    d: int,
    margin: float,
    distance: Literal["cosine", "euclidean"],
    negatives: Literal["all", "hardest"],
    seed: int,
) -> None:
    z1, z2 = embeddings(n, d, seed)
    loss, terms = triplet_loss(z1, z2, margin, distance, negatives)
    expected, violations = brute_force(z1.numpy(), z2.numpy(), margin, distance, negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if d > 1:  # in one dimension cosines are equal but for rounding
        assert terms["violations"].item() == pytest.approx(violations)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("negatives", ["all", "hardest"])
def test_gradient_is_that_of_the_loss(distance, negatives) -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(5, 3))
    assert torch.autograd.gradcheck(lambda a, b: triplet_loss(a, b, 0.5, distance, negatives)[0], (z1, z2))


def test_far_negatives_cost_nothing() -> None:
    z = 10 * torch.eye(4)
    loss, terms = triplet_loss(z, z, 0.5)
    assert loss == terms["violations"] == 0


def test_a_collapse_costs_the_margin() -> None:
    assert triplet_loss(torch.ones(4, 3), torch.ones(4, 3), 0.5)[0].item() == pytest.approx(0.5)


@given(n=st.integers(1, 6), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_squared_distances_are_those_of_all_pairs(n: int, d: int, seed: int) -> None:
    z, _ = embeddings(n, d, seed)
    expected = [[((a - b) ** 2).sum() for b in z.numpy()] for a in z.numpy()]
    np.testing.assert_allclose(squared_distances(z).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"distance": "euclidean", "negatives": "hardest", "margin": 1.5}])
def test_output_is_the_loss_of_the_embeddings_in_float32(fields: dict) -> None:
    torch.manual_seed(0)
    config = TripletConfig(projector=(16, 8), **fields)
    method = build_method(config, SMALL)
    assert isinstance(method, Triplet)
    generator = torch.Generator().manual_seed(0)
    given = Views([torch.randn(6, 3, 12, 12, generator=generator) for _ in range(2)], torch.arange(6), torch.zeros(6))
    with torch.autocast("cpu", torch.bfloat16):
        out = method(given)
        y1, z1 = method.branch(given.views[0])
        _, z2 = method.branch(given.views[1])
    expected = brute_force(
        z1.detach().double().numpy(), z2.detach().double().numpy(), config.margin, config.distance, config.negatives
    )
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected[0], rel=1e-4)
    assert torch.equal(out.embedding, z1.float())
    assert torch.equal(out.representation, y1.float())


def test_a_batch_without_negatives_is_refused() -> None:
    with pytest.raises(ValidationError, match="leaves 1 image and no negative: Triplet loss needs at least 2"):
        PretrainConfig.model_validate({"data": "x", "method": {"name": "triplet"}, "train": {"batch_size": 1}})
