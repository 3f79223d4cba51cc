"""SimSiam's loss, heads and rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, SGDConfig, SimSiamConfig
from jem.methods import build_method
from jem.methods.simsiam import SimSiam, simsiam_loss
from jem.train.optimizers import build_optimizer, set_rates

SMALL = BackboneConfig(stem="stride2", zero_init=False)


def paper(p1: np.ndarray, p2: np.ndarray, z1: np.ndarray, z2: np.ndarray) -> float:
    """Equations 1 and 2, image by image."""

    def distance(p: np.ndarray, z: np.ndarray) -> float:
        return -float(p @ z) / float(np.sqrt((p * p).sum() * (z * z).sum()))

    return sum((distance(p1[i], z2[i]) + distance(p2[i], z1[i])) / 2 for i in range(len(p1))) / len(p1)


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(
        [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(2)], torch.arange(6), torch.full((6,), -1)
    )


def make(**changes: object) -> SimSiam:
    torch.manual_seed(0)
    method = build_method(SimSiamConfig(**{"projector": (16, 16, 8), "predictor": 4, **changes}), SMALL)
    assert isinstance(method, SimSiam)
    return method


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = [rng.normal(size=(n, d)) for _ in range(4)]
    found = simsiam_loss(*(torch.from_numpy(x) for x in given))
    assert found.item() == pytest.approx(paper(*given), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("stop", [True, False])
def test_gradient_goes_through_the_projections_only_without_stop_gradient(stop: bool) -> None:
    method, given = make(stop_gradient=stop), views()
    out = method(given)
    (_, z1), (_, z2) = (method.branch(view) for view in given.views)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    t1, t2 = (z1.detach(), z2.detach()) if stop else (z1, z2)
    expected = simsiam_loss(p1, p2, t1, t2)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(out.embedding, z1)
    weight = method.branch.projector[0].weight
    found, whole = (torch.autograd.grad(loss, weight)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_projector_has_a_norm_after_each_layer_and_the_predictor_none_at_its_end() -> None:
    method = make()
    projector, predictor = list(method.branch.projector), list(method.predictor.children())
    kinds = ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in projector] == kinds
    assert projector[-1].weight is None
    assert [type(layer).__name__ for layer in predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert (predictor[0].weight.shape, predictor[-1].weight.shape) == ((4, 8), (8, 4))
    assert predictor[-1].bias is not None


def test_predictors_rate_stays_while_the_others_follow_the_schedule() -> None:
    method = make()
    optimizer = build_optimizer(method, SGDConfig(), 0.4)
    set_rates(optimizer, 0.1, 0.4, 1e-4)
    rates: dict[int, float] = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in method.predictor.parameters()} == {0.4}
    assert {rates[id(p)] for p in method.branch.parameters()} == {0.1}


def test_without_predictor_the_projection_is_the_prediction() -> None:
    method = make(predictor=None, norm=False)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in method.modules())
    assert list(method.predictor.parameters()) == []
    given = views()
    (_, z1), (_, z2) = (method.branch(view) for view in given.views)
    cosine: Tensor = nn.functional.cosine_similarity(z1, z2).mean()
    assert method(given).loss.item() == pytest.approx(-cosine.item(), rel=1e-5)


def test_three_views_and_one_image_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"exactly 2 views for SimSiam, not 3"):
        PretrainConfig(data="x", method={"name": "simsiam"}, augment={"views": [{"count": 3}]})
    with pytest.raises(ValidationError, match=r"leaves 1 image, which a batch norm cannot take: SimSiam"):
        PretrainConfig(data="x", method={"name": "simsiam"}, train={"batch_size": 1})
