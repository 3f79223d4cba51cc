"""DirectPred's predictor is the paper's function of the correlation of its inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, DirectPredConfig, MomentumConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.byol import byol_loss
from jem.methods.directpred import DirectPred, closed_form

SMALL = BackboneConfig(stem="cifar", zero_init=False)


def views(seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Views(images, torch.arange(12), torch.full((12,), -1))


def make(**changes: object) -> DirectPred:
    torch.manual_seed(0)
    method = build_method(DirectPredConfig(**{"projector": (16, 8), **changes}), SMALL).double()
    assert isinstance(method, DirectPred)
    return method


def correlation(method: DirectPred, given: Views) -> np.ndarray:
    """Mean of z z^T over the images of both views, one after the other."""
    rows = torch.cat([method.online(view)[1] for view in given.views]).detach().numpy()
    return sum((np.outer(row, row) for row in rows), np.zeros((8, 8))) / len(rows)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 8), seed=st.integers(0, 99))
def test_predictor_has_the_correlations_eigenvectors_and_the_papers_eigenvalues(n: int, d: int, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(n, d))
    f = z.T @ z / n
    w = closed_form(torch.from_numpy(f), 0.01).numpy()
    s, u = np.linalg.eigh(f)
    s = np.maximum(s, 0)
    # rounding is 1e-16, and the root of what it leaves of an eigenvalue of 0 is 1e-8
    np.testing.assert_allclose(u.T @ w @ u, np.diag(np.sqrt(s / s.max()) + 0.01), atol=1e-7)


def test_predictor_does_not_depend_on_the_embeddings_scale_and_bears_a_collapse() -> None:
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(closed_form(z.T @ z, 0.01), closed_form(1e6 * z.T @ z, 0.01))
    torch.testing.assert_close(closed_form(torch.zeros(4, 4), 0.01), 0.01 * torch.eye(4))


def test_correlation_keeps_rho_of_the_old_and_the_predictor_is_set_after_each_step() -> None:
    method = make()
    first, second = correlation(method, views(1)), correlation(method, views(2))
    assert torch.equal(method.predictor, torch.eye(8, dtype=torch.float64))
    method(views(1))
    method.after_step(Progress(1, 10))
    np.testing.assert_allclose(method.correlation.numpy(), first, rtol=1e-9)
    torch.testing.assert_close(method.predictor, closed_form(torch.from_numpy(first), 0.01))
    method(views(2))
    method.after_step(Progress(2, 10))
    expected = torch.from_numpy(0.3 * first + 0.7 * second)
    torch.testing.assert_close(method.correlation, expected)
    torch.testing.assert_close(method.predictor, closed_form(expected, 0.01))


def test_a_batch_in_parts_counts_once() -> None:
    whole, parts = make(), make()
    first, second = correlation(whole, views(1)), correlation(whole, views(2))
    parts(views(1)), parts(views(2))
    parts.after_step(Progress(1, 10))
    np.testing.assert_allclose(parts.correlation.numpy(), (first + second) / 2, rtol=1e-9)


def test_predictor_waits_for_its_turn() -> None:
    method = make(every=2)
    for step in (1, 2):
        before = method.predictor.clone()
        method(views(step))
        method.after_step(Progress(step, 10))
        assert torch.equal(method.predictor, before) == (step == 1)


@pytest.mark.parametrize("momentum", [MomentumConfig(tau=0.5), None])
def test_loss_is_byols_with_the_matrix_for_a_predictor_and_no_parameter_for_it(momentum: MomentumConfig | None) -> None:
    method, given = make(momentum=momentum), views()
    method(given)
    method.after_step(Progress(1, 10))
    z1, z2 = (method.online(view)[1] for view in given.views)
    t1, t2 = (z1, z2) if method.target is None else (method.target(view)[1] for view in given.views)
    w: Tensor = method.predictor
    expected = byol_loss(z1 @ w.T, t2) + byol_loss(z2 @ w.T, t1)
    assert method(given).loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert not any(name.startswith("predictor") for name, _ in method.named_parameters())
    assert (method.target is None) == (momentum is None)


def test_momentum_target_follows() -> None:
    method = make(momentum=MomentumConfig(tau=0.75, schedule="constant"))
    assert method.target is not None
    old = method.target.projector[0].weight.clone()
    with torch.no_grad():
        method.online.projector[0].weight += 1
    method(views())
    method.after_step(Progress(1, 10))
    torch.testing.assert_close(method.target.projector[0].weight, old + 0.25)


def test_predictor_stays_in_float32_under_autocast() -> None:
    method = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        given = views()
        out = method(Views([view.float() for view in given.views], given.id, given.label))
    method.after_step(Progress(1, 10))
    assert {out.loss.dtype, method.predictor.dtype, method.correlation.dtype} == {torch.float32}


def test_a_share_over_1_and_multi_crop_are_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        PretrainConfig(data="x", method={"name": "directpred", "rho": 1.5})
    with pytest.raises(ValidationError, match=r"2 views for DirectPred, not 4 \(it cannot use multi-crop\)"):
        PretrainConfig(data="x", method={"name": "directpred"}, augment={"views": [{"count": 4}]})
