"""W-MSE: sub-batches are white, and the loss is the mean over all positive pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, WMSEConfig
from jem.methods import Progress, build_method
from jem.methods.wmse import WMSE, whiten, wmse_loss

SMALL = BackboneConfig(stem="stride2")


def embeddings(n: int, d: int, seed: int = 0, views: int = 2) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return [torch.from_numpy(first + 0.5 * rng.normal(size=(n, d))) for _ in range(views)]


def paper(views: list[np.ndarray], partitions: np.ndarray, size: int, epsilon: float) -> float:
    """Mean of 2 - 2 cos over pairs of views, images and partitions, one image at a time."""
    n, d = views[0].shape
    costs = []
    for order in partitions:
        for start in range(0, n, size):
            chosen = order[start : start + size]
            white = []
            for z in views:
                part = z[chosen]
                covariance = np.cov(part, rowvar=False).reshape(d, d)
                factor = np.linalg.cholesky(covariance + epsilon * np.trace(covariance) / d * np.eye(d))
                white.append([np.linalg.inv(factor) @ (row - part.mean(axis=0)) for row in part])
            for i in range(len(views)):
                for j in range(i):
                    for a, b in zip(white[i], white[j], strict=True):
                        costs.append(2 - 2 * a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return float(np.mean(costs))


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 6),
    more=st.integers(1, 6),
    parts=st.integers(1, 3),
    partitions=st.integers(1, 3),
    views=st.integers(2, 4),
    epsilon=st.sampled_from([0.0, 1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_loss_is_the_papers(
    d: int, more: int, parts: int, partitions: int, views: int, epsilon: float, seed: int
) -> None:
    size = d + 1 + more
    each = embeddings(parts * size, d, seed, views)
    order = torch.stack(
        [torch.randperm(parts * size, generator=torch.Generator().manual_seed(k)) for k in range(partitions)]
    )
    found = wmse_loss(each, order, size, epsilon).item()
    assert found == pytest.approx(paper([z.numpy() for z in each], order.numpy(), size, epsilon), rel=1e-8)
    alone = [wmse_loss(each, one, size, epsilon).item() for one in order]
    assert found == pytest.approx(np.mean(alone), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 32), more=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_whitened_sub_batch_has_the_identity_as_covariance(d: int, more: int, seed: int) -> None:
    z = embeddings(d + more, d, seed, 1)[0]
    white = whiten(torch.stack([z, 1e-3 * z + 5]), 0.0)
    for each in white:
        torch.testing.assert_close(torch.cov(each.T).view(d, d), torch.eye(d).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(each.mean(dim=0), torch.zeros(d).double(), rtol=0, atol=1e-6)


def test_the_default_epsilon_moves_the_identity_by_little_in_float32_and_knows_no_scale() -> None:
    epsilon, z = WMSEConfig().epsilon, embeddings(128, 64, views=1)[0].float()
    torch.testing.assert_close(torch.cov(whiten(z, epsilon).T), torch.eye(64), rtol=0, atol=0.05)
    torch.testing.assert_close(whiten(1e-4 * z, epsilon), whiten(z, epsilon), rtol=1e-3, atol=1e-3)


def test_gradient_is_that_of_the_loss_through_both_views() -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(10, 3))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda a, b: wmse_loss([a, b], order, 5, 1e-5), (z1, z2))
    wmse_loss([z1, z2], order, 5, 1e-5).backward()
    assert z1.grad.norm() > 0
    assert z2.grad.norm() > 0


def test_a_collapsed_embedding_is_not_a_number_so_that_the_loop_stops() -> None:
    good, order = embeddings(8, 2, views=1)[0], torch.arange(8)
    assert torch.isnan(wmse_loss([torch.ones(8, 2).double(), good], order, 4, 1e-5))
    assert not torch.isnan(wmse_loss([good, good], order, 4, 1e-5))


def batch(n: int = 12, count: int = 2) -> Views:
    generator = torch.Generator().manual_seed(0)
    each = [torch.randn(n, 3, 16, 16, generator=generator) for _ in range(count)]
    return Views(each, torch.arange(n), torch.full((n,), -1))


def make(**fields: object) -> WMSE:
    torch.manual_seed(0)
    method = build_method(WMSEConfig(**{"projector": (16, 4), "sub_batch": 6, **fields}), SMALL)
    assert isinstance(method, WMSE)
    return method


def test_output_is_the_loss_of_all_pairs_of_views_over_partitions_drawn_for_the_step() -> None:
    method, given = make(partitions=3), batch(count=3)
    method.before_step(Progress(step=5, total=9))
    out = method(given)
    generator = Progress(step=5, total=9).generator()
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    embedded = [method.branch(view) for view in given.views]
    torch.testing.assert_close(out.loss, wmse_loss([z for _, z in embedded], order, 6, 1e-5))
    assert torch.equal(out.embedding, embedded[0][1])
    assert torch.equal(out.representation, embedded[0][0])


def test_under_autocast_it_whitens_in_float32() -> None:
    method, given = make(), batch()
    method.before_step(Progress(step=1, total=9))
    with torch.autocast("cpu", torch.bfloat16):
        out = method(given)
        out.loss.backward()
        embedded = [method.branch(view)[1].detach() for view in given.views]
    assert embedded[0].dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    order = torch.randperm(12, generator=Progress(step=1, total=9).generator())
    expected = paper([z.double().numpy() for z in embedded], order[None].numpy(), 6, 1e-5)
    assert out.loss.item() == pytest.approx(expected, rel=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


@pytest.mark.parametrize(
    ("method", "train", "words"),
    [
        ({"sub_batch": 512}, {}, r"sub_batch 512 is more than train.batch_size 256: there are not so many"),
        ({}, {"accumulate": 4}, r"sub_batch 128 is more than train.batch_size 256 in 4 parts of 64"),
        ({"sub_batch": 100}, {}, r"256 is no multiple of method.sub_batch 100: .* make it a multiple of 100"),
        ({"sub_batch": 64}, {}, r"sub_batch 64 is not larger than the embedding's 64 dimensions: .* rank 63"),
    ],
)
def test_sub_batches_that_cannot_be_whitened_are_refused(method: dict, train: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate({"data": "x", "method": {"name": "wmse", **method}, "train": train})
