"""SimCLR's loss is NT-Xent, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, SimCLRConfig
from jem.methods import build_method
from jem.methods.simclr import SimCLR, nt_xent

SMALL = BackboneConfig(stem="stride2")


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return 3 * first, first + second


def paper(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Equation 1 and the sum over both orders of each pair, as algorithm 1 writes it."""
    n, z = len(z1), [*z1, *z2]

    def sim(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])))

    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        below = sum(math.exp(sim(i, k) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(sim(i, j) / temperature) / below)
    return total / (2 * n)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), d=st.integers(1, 6), temperature=st.floats(0.1, 2), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, d: int, temperature: float, seed: int) -> None:
    z1, z2 = embeddings(n, d, seed)
    loss, _ = nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(paper(z1.numpy(), z2.numpy(), temperature), rel=1e-10, abs=1e-12)


def test_terms_are_those_of_the_energy() -> None:
    """The notes' form: -beta sim + logsumexp(beta sim), beta = 1 / T."""
    (z1, z2), beta = embeddings(5, 4), 1 / 0.3
    unit = np.concatenate([z1, z2]) / np.linalg.norm(np.concatenate([z1, z2]), axis=1, keepdims=True)
    sim = beta * unit @ unit.T
    attraction = -np.mean([sim[i, (i + 5) % 10] for i in range(10)])
    repulsion = np.mean([math.log(sum(math.exp(sim[i, k]) for k in range(10) if k != i)) for i in range(10)])
    loss, terms = nt_xent(z1, z2, 0.3)
    assert [terms["attraction"].item(), terms["repulsion"].item()] == pytest.approx([attraction, repulsion], rel=1e-12)
    assert loss.item() == pytest.approx(attraction + repulsion, rel=1e-12)


def test_gradient_is_that_of_the_loss() -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5)[0], (z1, z2))


def test_loss_knows_neither_norms_nor_order_nor_which_view_is_first() -> None:
    z1, z2 = embeddings(6, 4)
    loss, _ = nt_xent(z1, z2, 0.2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for other in (nt_xent(7 * z1, z2 / 3, 0.2), nt_xent(z1[order], z2[order], 0.2), nt_xent(z2, z1, 0.2)):
        torch.testing.assert_close(other[0], loss, rtol=1e-12, atol=1e-12)


def test_a_constant_embedding_costs_the_logarithm_of_the_candidates() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(z, z, 0.2)[0].item() == pytest.approx(math.log(11), rel=1e-12)


def test_output_is_the_loss_of_both_views_embeddings() -> None:
    torch.manual_seed(0)
    method = build_method(SimCLRConfig(projector=(16, 8)), SMALL)
    assert isinstance(method, SimCLR)
    first, second = torch.randn(2, 4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(Views([first, second], torch.arange(4), torch.full((4,), -1)))
        z2 = method.branch(second)[1].float()
    assert out.loss.dtype == out.embedding.dtype == out.representation.dtype == torch.float32
    torch.testing.assert_close(out.loss, nt_xent(out.embedding, z2, 0.2)[0])
    assert (out.embedding.shape, out.representation.shape) == ((4, 8), (4, 512))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"batch_size": 1}}, r"leaves 1 image.*needs at least 2"),
        ({"train": {"batch_size": 4, "accumulate": 4}}, r"in 4 part\(s\) leaves 1 image"),
        ({"augment": {"views": [{"count": 3}]}}, "exactly 2 views for SimCLR"),
        ({"method": {"name": "simclr", "temperature": 0}}, "greater than 0"),
        ({"method": {"name": "simclr", "queue": 4096}}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate({"data": "somewhere", "method": {"name": "simclr"}, **changes})
