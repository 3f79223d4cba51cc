"""BYOL's loss, its target network, and its ablations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from jem.batch import Views
from jem.config import BackboneConfig, BYOLConfig, MomentumConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.byol import BYOL, byol_loss

SMALL = BackboneConfig(stem="stride2")


def paper(p: np.ndarray, z: np.ndarray) -> float:
    """Mean over the images of the squared distance of the unit vectors (equation 2), entry by entry."""
    total = 0.0
    for i in range(len(p)):
        length_p = math.sqrt(sum(x * x for x in p[i]))
        length_z = math.sqrt(sum(x * x for x in z[i]))
        total += sum((a / length_p - b / length_z) ** 2 for a, b in zip(p[i], z[i], strict=True))
    return total / len(p)


def views(seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    return Views(
        [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(2)], torch.arange(6), torch.full((6,), -1)
    )


def make(**changes: object) -> BYOL:
    torch.manual_seed(0)
    method = build_method(BYOLConfig(**{"projector": (16, 8), "predictor": (16,), **changes}), SMALL)
    assert isinstance(method, BYOL)
    return method


def step(method: BYOL, progress: Progress) -> None:
    """One step of plain gradient descent."""
    method(views(progress.step)).loss.backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    method.after_step(progress)


def weights(network: nn.Module | None) -> list[Tensor]:
    assert network is not None
    return [parameter.detach().clone() for parameter in network.parameters()]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_loss_is_the_squared_distance_of_the_unit_vectors(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, z = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    assert byol_loss(torch.from_numpy(p), torch.from_numpy(z)).item() == pytest.approx(paper(p, z), rel=1e-10)


def test_both_directions_are_added_and_the_target_gets_no_gradient() -> None:
    method = make()
    assert method.target is not None
    given = views()
    out = method(given)
    z1, z2 = (method.online(view)[1] for view in given.views)
    t1, t2 = (method.target(view)[1] for view in given.views)
    p1, p2 = (method.predictor(z).detach().numpy() for z in (z1, z2))
    assert out.loss.item() == pytest.approx(paper(p1, t2.numpy()) + paper(p2, t1.numpy()), rel=1e-5)
    assert torch.equal(out.embedding, z1)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in method.target.parameters())
    assert all(parameter.grad is not None for parameter in method.online.parameters())


def test_target_begins_as_the_online_network_and_follows_after_the_step() -> None:
    method = make(momentum=MomentumConfig(tau=0.9, final=1.0, schedule="cosine"))
    before, online = weights(method.target), weights(method.online)
    assert all(torch.equal(a, b) for a, b in zip(before, online, strict=True))
    step(method, Progress(5, 10))
    tau = 1 - 0.1 * (1 + math.cos(math.pi / 2)) / 2
    for old, new, now in zip(before, weights(method.target), weights(method.online), strict=True):
        torch.testing.assert_close(new, tau * old + (1 - tau) * now)
    assert not torch.equal(weights(method.online)[0], online[0])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_at_tau_0_the_target_is_the_online_network_and_at_1_it_never_moves(tau: float) -> None:
    method = make(momentum=MomentumConfig(tau=tau, schedule="constant"))
    before = weights(method.target)
    step(method, Progress(1, 10))
    expected = before if tau else weights(method.online)
    assert all(torch.equal(a, b) for a, b in zip(weights(method.target), expected, strict=True))


def test_scaled_target_is_the_online_network_times_the_scalar_from_the_beginning() -> None:
    method = make(target="scaled", scale=0.5)
    for _ in range(2):
        for ours, theirs in zip(weights(method.target), weights(method.online), strict=True):
            torch.testing.assert_close(ours, 0.5 * theirs)
        step(method, Progress(1, 10))


def test_targets_batch_norms_take_the_batchs_statistics_and_keep_their_own() -> None:
    method = make()
    assert method.target is not None
    method(views())
    norm = method.target.backbone.bn1
    assert norm.training
    assert norm.num_batches_tracked.item() == 2
    assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


def test_target_leaves_no_block_of_a_vit_out() -> None:
    torch.manual_seed(0)
    backbone = BackboneConfig(name="vit_tiny", patch=4, drop_path=0.5)
    method = build_method(BYOLConfig(projector=(8,), predictor=()), backbone)
    assert isinstance(method, BYOL)
    assert method.target is not None
    image = views().views[0]
    assert torch.equal(method.target(image)[1], method.target(image)[1])
    assert not torch.equal(method.online(image)[1], method.online(image)[1])


def test_without_stop_gradient_the_online_network_is_trained_from_both_sides() -> None:
    method, given = make(stop_gradient=False), views()
    assert method.target is None
    out = method(given)
    z1, z2 = (method.online(view)[1] for view in given.views)
    expected = byol_loss(method.predictor(z1), z2) + byol_loss(method.predictor(z2), z1)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(out.loss, method.online.projector[0].weight)[0]
    whole = torch.autograd.grad(expected, method.online.projector[0].weight)[0]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def linear_spread(predictor: bool, stop: bool) -> float:
    """Spread of a linear network's embeddings after BYOL of noisy views, relative to their length at the start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator, dtype=torch.float64) + 1
    w = torch.randn(8, 16, generator=generator, dtype=torch.float64) / 4
    h = torch.eye(8, dtype=torch.float64)
    w.requires_grad_(), h.requires_grad_()
    for _ in range(400):
        one, two = (x + torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        z1, z2 = one @ w.T, two @ w.T
        t1, t2 = (z1.detach(), z2.detach()) if stop else (z1, z2)
        p1, p2 = (z1 @ h.T, z2 @ h.T) if predictor else (z1, z2)
        loss = byol_loss(p1, t2) + byol_loss(p2, t1)
        grad_w, grad_h = torch.autograd.grad(loss, (w, h), allow_unused=True)
        with torch.no_grad():
            w -= 0.5 * grad_w
            if predictor:
                h -= 5.0 * grad_h  # the predictor has to be ahead of the network
    z = nn.functional.normalize(x @ w.detach().T, dim=1)
    return (z - z.mean(dim=0)).square().sum(dim=1).mean().sqrt().item()


def test_without_predictor_or_without_stop_gradient_the_embedding_shrinks_to_one_direction() -> None:
    kept = linear_spread(predictor=True, stop=True)
    assert linear_spread(predictor=False, stop=True) < 0.5 * kept
    assert linear_spread(predictor=True, stop=False) < 0.5 * kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "scaled"}, "target: scaled needs scale"),
        ({"scale": 0.5}, "scale is for target: scaled"),
        ({"target": "scaled", "scale": 0.5, "stop_gradient": False}, "has no target network"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(data="x", method={"name": "byol", **changes})


def test_one_image_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"leaves 1 image, which a batch norm cannot take: BYOL"):
        PretrainConfig(data="x", method={"name": "byol"}, train={"batch_size": 2, "accumulate": 2})
