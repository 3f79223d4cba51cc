"""Barlow Twins' loss is the paper's, with its exact gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jem.batch import Views
from jem.config import BackboneConfig, BarlowConfig, PretrainConfig
from jem.errors import InputError
from jem.methods import build_method
from jem.methods.barlow import BarlowTwins, barlow_loss

SMALL = BackboneConfig(stem="stride2")


def paper(z1: np.ndarray, z2: np.ndarray) -> tuple[float, float]:
    """The two sums of equation 1, entry by entry, each dimension divided by sqrt(var + 1e-5)."""
    n, d = z1.shape

    def standardised(z: np.ndarray) -> list[list[float]]:
        columns = []
        for j in range(d):
            mean = sum(z[:, j]) / n
            var = sum((x - mean) ** 2 for x in z[:, j]) / n
            columns.append([(x - mean) / math.sqrt(var + 1e-5) for x in z[:, j]])
        return columns

    a, b = standardised(z1), standardised(z2)
    on, off = 0.0, 0.0
    for i in range(d):
        for j in range(d):
            c = sum(a[i][k] * b[j][k] for k in range(n)) / n
            on, off = (on + (1 - c) ** 2, off) if i == j else (on, off + c**2)
    return on, off


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(n, d)) * rng.uniform(0.01, 3, size=d) + rng.normal(size=d)
    return torch.from_numpy(first), torch.from_numpy(first + 0.3 * rng.normal(size=(n, d)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), d=st.integers(1, 26), lam=st.floats(0, 2), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, d: int, lam: float, seed: int) -> None:
    z1, z2 = embeddings(n, d, seed)
    loss, terms = barlow_loss(z1, z2, lam)
    on, off = paper(z1.numpy(), z2.numpy())
    assert [terms[name].item() for name in ("invariance", "redundancy")] == pytest.approx([on, off], rel=1e-9, abs=1e-9)
    assert loss.item() == pytest.approx(on + lam * off, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("d", [4, 11, 12, 20])
def test_gradient_is_that_of_the_loss_through_the_standardisation(d: int) -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(6, d))
    assert torch.autograd.gradcheck(lambda a, b: barlow_loss(a, b, 0.3)[0], (z1, z2))


def test_gradient_of_wide_embeddings_is_that_of_the_cross_correlation_matrix() -> None:
    """Written out, entry by entry of the (d, d) matrix, which the loss does not make."""
    z1, z2 = (z.requires_grad_() for z in embeddings(8, 40))
    loss, _ = barlow_loss(z1, z2, 0.3)
    a, b = (torch.nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = torch.einsum("ni,nj->ij", a, b) / 8
    weights = torch.full((40, 40), 0.3, dtype=torch.float64).fill_diagonal_(1)
    expected = (weights * (c - torch.eye(40)).square()).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
def test_wide_embeddings_are_as_precise_in_float32(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(32, 256, generator=generator, dtype=torch.float64)
    z2 = z1 + noise * torch.randn(32, 256, generator=generator, dtype=torch.float64)
    c = torch.corrcoef(torch.cat([z1, z2], dim=1).T)[:256, 256:]
    off = c.square().sum() - c.diagonal().square().sum()
    _, terms = barlow_loss(z1.float(), z2.float(), 1.0)
    assert terms["redundancy"].item() == pytest.approx(off.item(), rel=1e-4)  # the epsilon: 1e-5 of the variance
    _, exact = barlow_loss(z1, z2, 1.0)
    assert terms["redundancy"].item() == pytest.approx(exact["redundancy"].item(), rel=2e-6)


def test_wide_embeddings_need_no_matrix_of_their_width() -> None:
    z1, z2 = embeddings(8, 64)
    with Largest() as seen:
        barlow_loss(z1, z2, 0.1)
    assert seen.numbers == 8 * 64


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(each.numel() for each in tree_leaves(out) if isinstance(each, Tensor)))
        return out


def test_it_is_blind_to_shift_and_scale_of_each_dimension() -> None:
    z1, z2 = embeddings(9, 4)
    shift, scale = torch.arange(4.0), torch.tensor([3.0, 1.0, 7.0, 2.0])
    assert barlow_loss(1e3 * z1 * scale + shift, 1e3 * z2, 0.1)[0].item() == pytest.approx(
        barlow_loss(1e3 * z1, 1e3 * z2, 0.1)[0].item(), rel=1e-6
    )


def test_equal_and_uncorrelated_dimensions_cost_nothing_and_collapsed_ones_the_most() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_loss(z, z, 1.0)[0].item() == pytest.approx(0, abs=1e-8)
    collapsed = torch.ones(4, 2, requires_grad=True)
    loss, _ = barlow_loss(collapsed, collapsed, 1.0)
    loss.backward()
    assert loss.item() == 2
    assert torch.isfinite(collapsed.grad).all()


def test_one_image_has_no_correlation() -> None:
    with pytest.raises(InputError, match=r"has 1 image: raise train.batch_size"):
        barlow_loss(torch.zeros(1, 4), torch.zeros(1, 4), 1.0)


def views(n: int = 6) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views([torch.randn(n, 3, 16, 16, generator=generator) for _ in range(2)], torch.arange(n), torch.zeros(n))


def make(**fields: object) -> BarlowTwins:
    torch.manual_seed(0)
    method = build_method(BarlowConfig(**{"projector": (32, 16), **fields}), SMALL)
    assert isinstance(method, BarlowTwins)
    return method


def test_output_is_the_loss_of_the_embeddings_times_the_scale() -> None:
    method, given = make(scale=0.1, lam=0.02), views()
    out = method(given)
    (y1, z1), (_, z2) = (method.branch(view) for view in given.views)
    loss, terms = barlow_loss(z1, z2, 0.02)
    torch.testing.assert_close(out.loss, 0.1 * loss)
    assert out.terms == terms
    assert torch.equal(out.embedding, z1)
    assert torch.equal(out.representation, y1)
    assert method.branch.projector[-1].bias is None, "the standardisation would take it out again"


def test_under_autocast_the_loss_stays_in_float32() -> None:
    method, given = make(), views()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(given)
        z2 = method.branch(given.views[1])[1]
    assert z2.dtype == torch.bfloat16
    assert {out.loss.dtype, out.embedding.dtype} == {torch.float32}
    on, off = paper(out.embedding.double().numpy(), z2.detach().double().numpy())
    assert out.loss.item() == pytest.approx(on + 5e-3 * off, rel=1e-4)


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(ValidationError, match="leaves 1 image, which has no correlation"):
        PretrainConfig.model_validate(
            {"data": "x", "method": {"name": "barlow"}, "train": {"batch_size": 4, "accumulate": 4}}
        )
