"""VICReg's loss is the paper's, and its networks are as configured."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jem.batch import Views
from jem.config import BackboneConfig, VICRegConfig
from jem.errors import InputError
from jem.methods import build_method
from jem.methods.vicreg import VICReg, covariance, invariance, variance, variance_ablated, vicreg_loss

SMALL = BackboneConfig(stem="stride2")


def paper(z1: np.ndarray, z2: np.ndarray) -> tuple[float, float, float]:
    """s, (v + v') / 2 and c + c' of the paper, entry by entry, with the two divisors of the published code."""
    n, d = z1.shape

    def v(z: np.ndarray) -> float:
        total = 0.0
        for j in range(d):
            mean = sum(z[i, j] for i in range(n)) / n
            var = sum((z[i, j] - mean) ** 2 for i in range(n)) / (n - 1)
            total += max(0.0, 1.0 - math.sqrt(var + 1e-4))
        return total / d

    def c(z: np.ndarray) -> float:
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        total = 0.0
        for j in range(d):
            for k in range(d):
                if j != k:
                    total += (sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1)) ** 2
        return total / d

    s = sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / n / d
    return s, (v(z1) + v(z2)) / 2, c(z1) + c(z2)


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / d**0.5
    first = rng.normal(size=(n, d)) @ mix * rng.uniform(0, 2, size=d) + rng.normal(size=d)
    return torch.from_numpy(first), torch.from_numpy(first + 0.3 * rng.normal(size=(n, d)))


# --- the loss -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, d: int, seed: int) -> None:
    z1, z2 = embeddings(n, d, seed)
    loss, terms = vicreg_loss(z1, z2, lam=25.0, mu=24.0, nu=1.5)
    s, v, c = paper(z1.numpy(), z2.numpy())
    found = [terms[name].item() for name in ("invariance", "variance", "covariance")]
    assert found == pytest.approx([s, v, c], rel=1e-11, abs=1e-12)
    assert loss.item() == pytest.approx(25 * s + 24 * v + 1.5 * c, rel=1e-11)


@pytest.mark.parametrize(("n", "d"), [(5, 3), (4, 8), (3, 9)])  # the smaller matrix is (d, d), (N, N), (N, N)
def test_gradient_is_that_of_the_loss(n: int, d: int) -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(n, d))
    assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a, b, 2.0, 3.0, 4.0)[0], (z1, z2))


def test_covariance_of_many_dimensions_keeps_float32s_precision() -> None:
    z, _ = embeddings(64, 512)
    exact = covariance(z).item()
    assert covariance(z.float()).item() == pytest.approx(exact, rel=1e-5)
    assert covariance(z[:, :64].float()).item() == pytest.approx(covariance(z[:, :64]).item(), rel=1e-5)


def test_collapsed_embeddings_cost_the_whole_hinge_and_their_gradient_is_finite() -> None:
    z = torch.ones(8, 4, requires_grad=True)
    loss, terms = vicreg_loss(z, z, 25.0, 25.0, 1.0)
    loss.backward()
    assert terms["variance"].item() == pytest.approx(0.99)  # 1 - sqrt(1e-4)
    assert terms["invariance"].item() == terms["covariance"].item() == 0
    assert torch.isfinite(z.grad).all()


def test_spread_and_uncorrelated_embeddings_of_equal_views_cost_nothing() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert vicreg_loss(z, z, 25.0, 25.0, 1.0)[0].item() == pytest.approx(0, abs=1e-6)


def test_one_image_has_no_variance() -> None:
    with pytest.raises(InputError, match=r"has 1 image: raise train.batch_size"):
        vicreg_loss(torch.zeros(1, 4), torch.zeros(1, 4), 25.0, 25.0, 1.0)


def test_hinge_on_the_variance_is_its_definition_and_has_no_gradient_at_collapse() -> None:
    """The paper's ablation: the slope of Var is proportional to the deviation, that of its root is not."""
    z, _ = embeddings(7, 5)
    expected = np.mean([max(0.0, 1.0 - var) for var in z.numpy().var(axis=0, ddof=1)])
    assert variance_ablated(z).item() == pytest.approx(expected, rel=1e-12)
    slopes = {}
    for name, term in (("std", variance), ("variance", variance_ablated)):
        for deviation in (1e-2, 1e-4):
            near = (deviation * (z - z.mean(dim=0))).requires_grad_()
            term(near).backward()
            slopes[name, deviation] = near.grad.norm().item()
    assert slopes["variance", 1e-4] == pytest.approx(1e-2 * slopes["variance", 1e-2], rel=1e-6)
    assert slopes["std", 1e-2] > 10 * slopes["variance", 1e-2]
    collapsed = torch.ones(7, 5, requires_grad=True)
    variance_ablated(collapsed).backward()
    assert not collapsed.grad.any()


def descend(mu: float, nu: float, hinge: Literal["std", "variance"] = "std", noise: float = 0.5) -> Tensor:
    """Embeddings of 64 noisy views by a linear network that VICReg trained."""
    torch.manual_seed(0)
    network = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    x = torch.randn(64, 16)
    for _ in range(300):
        z1, z2 = (network(x + noise * torch.randn_like(x)) for _ in range(2))
        optimizer.zero_grad()
        vicreg_loss(z1, z2, 25.0, mu, nu, hinge)[0].backward()
        optimizer.step()
    return network(x).detach()


def test_without_the_variance_term_the_embedding_collapses_and_with_it_it_does_not() -> None:
    assert descend(mu=0.0, nu=1.0).std(dim=0).max() < 0.01
    assert descend(mu=25.0, nu=1.0).std(dim=0).min() > 0.5


def test_with_the_variance_in_place_of_the_standard_deviation_it_collapses_where_the_views_differ_much() -> None:
    assert descend(mu=25.0, nu=1.0, hinge="variance", noise=1.5).std(dim=0).max() < 0.01
    assert descend(mu=25.0, nu=1.0, hinge="std", noise=1.5).std(dim=0).min() > 0.2


def test_without_the_covariance_term_dimensions_stay_correlated() -> None:
    def correlation(z: Tensor) -> float:
        entries = torch.corrcoef(z.T).abs()
        return (entries.sum() - entries.trace()).item() / (8 * 7)

    assert correlation(descend(mu=25.0, nu=25.0)) < 0.5 * correlation(descend(mu=25.0, nu=0.0))


# --- the networks -------------------------------------------------------------------------------------------------


def views(n: int = 6, size: int = 16, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, 3, size, size, generator=generator) for _ in range(2))
    return Views([first, second], torch.arange(n), torch.full((n,), -1))


def make(seed: int = 0, **settings: object) -> VICReg:
    torch.manual_seed(seed)
    method = build_method(VICRegConfig(**{"expander": (32, 16), **settings}), SMALL, None)
    assert isinstance(method, VICReg)
    return method


def test_output_is_the_loss_of_the_two_branches_embeddings() -> None:
    method = make(branches="separate")
    given = views()
    out = method(given)
    first, second = method.branches
    z1, z2 = (
        branch.projector(branch.backbone(view)) for branch, view in zip((first, second), given.views, strict=True)
    )
    loss, terms = vicreg_loss(z1, z2, 25.0, 25.0, 1.0)
    assert torch.equal(out.loss, loss)
    assert torch.equal(out.embedding, z1)
    assert torch.equal(out.representation, first.backbone(given.views[0]))
    assert out.terms == terms
    assert {name: tensor.requires_grad for name, tensor in out.terms.items()} == dict.fromkeys(terms, False)
    assert not out.embedding.requires_grad
    assert not out.representation.requires_grad
    assert (out.embedding.shape, out.representation.shape) == ((6, 16), (6, 512))


def test_shared_branches_are_one_network_and_separate_ones_two_alike_that_start_apart() -> None:
    shared, separate = make(branches="shared"), make(branches="separate")
    assert len(shared.branches) == 1
    first, second = separate.branches
    assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
    assert not torch.equal(first.backbone.conv1.weight, second.backbone.conv1.weight)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_branches_may_be_of_different_architectures_and_sizes_of_view_and_the_first_is_kept() -> None:
    first, second = BackboneConfig(name="resnet50", stem="imagenet"), BackboneConfig(name="resnet18", stem="cifar")
    method = make(branches=(first, second))
    assert (method.backbone.config, method.backbone.dim) == (first, 2048)
    given = views()
    out = method(Views([torch.randn(6, 3, 64, 64), given.views[1]], given.id, given.label))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert method.representation(torch.randn(2, 3, 64, 64)).shape == (2, 2048)


def test_expander_is_blocks_of_linear_norm_and_relu_with_a_last_layer_without_bias() -> None:
    expander = make(expander=(64, 32, 16)).branches[0].projector
    names = [type(layer).__name__ for layer in expander]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.weight.shape for layer in expander if isinstance(layer, nn.Linear)] == [(64, 512), (32, 64), (16, 32)]
    assert expander[-1].bias is None


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = make(seed=3).state_dict(), make(seed=3).state_dict(), make(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["branches.0.backbone.conv1.weight"], other["branches.0.backbone.conv1.weight"])


def test_state_dictionary_holds_the_whole_state() -> None:
    method = make(branches="separate")
    method(views(seed=1)).loss.backward()  # moves the norms' statistics
    copy = make(seed=5, branches="separate")
    copy.load_state_dict(method.state_dict())
    assert torch.equal(method(views(seed=2)).loss, copy(views(seed=2)).loss)
    method.eval(), copy.eval()
    images = views(seed=3).views[0]
    assert torch.equal(method.representation(images), copy.representation(images))


def test_under_autocast_the_loss_stays_in_float32() -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        given = views()
        out = method(given)
        z2 = method.branches[0](given.views[1])[1]
    assert z2.dtype == torch.bfloat16
    assert {out.loss.dtype, out.embedding.dtype, out.representation.dtype} == {torch.float32}
    s, v, c = paper(out.embedding.double().numpy(), z2.detach().double().numpy())
    assert out.loss.item() == pytest.approx(25 * s + 25 * v + c, rel=1e-5)


def test_terms_are_functions_of_one_batch() -> None:
    """Pure: neither changes its input, nor depends on the order of the images."""
    z1, z2 = embeddings(9, 5)
    kept, order = z1.clone(), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for term in (variance, covariance, partial(invariance, z2=z2)):
        before = term(z1)
        assert torch.equal(z1, kept)
        again = invariance(z1[order], z2[order]) if isinstance(term, partial) else term(z1[order])
        torch.testing.assert_close(again, before, rtol=1e-12, atol=1e-13)
