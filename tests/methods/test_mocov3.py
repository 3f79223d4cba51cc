"""MoCo v3's loss is algorithm 1's, and only the query network learns by gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from jem.batch import Views
from jem.config import BackboneConfig, MoCoV3Config, MomentumConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.mocov3 import MoCoV3, ctr

SMALL = BackboneConfig(stem="stride2", zero_init=False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper(q: np.ndarray, k: np.ndarray, tau: float) -> float:
    """ctr of algorithm 1: 2 tau times the cross entropy of row i with label i."""
    total = 0.0
    for i in range(len(q)):
        sims = [float(q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j])) / tau for j in range(len(k))]
        total -= math.log(math.exp(sims[i]) / sum(math.exp(sim) for sim in sims))
    return 2 * tau * total / len(q)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), d=st.integers(1, 6), tau=st.floats(0.1, 2), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, d: int, tau: float, seed: int) -> None:
    q, k = randn(n, d, seed=seed), randn(n, d, seed=seed + 100)
    assert sum(ctr(q, k, tau)).item() == pytest.approx(paper(q.numpy(), k.numpy(), tau), rel=1e-10, abs=1e-12)


def test_a_workers_queries_meet_the_keys_of_all() -> None:
    q, k = randn(6, 4), randn(6, 4, seed=1)
    parts = [sum(ctr(q[first : first + 2], k, 0.2, first)) for first in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, sum(ctr(q, k, 0.2)), rtol=1e-12, atol=1e-12)


def make(**settings: Any) -> MoCoV3:
    torch.manual_seed(0)
    method = build_method(MoCoV3Config(**{"projector": (16, 8), "predictor": (12,), **settings}), SMALL).double()
    assert isinstance(method, MoCoV3)
    return method


def views(seed: int = 0) -> Views:
    first, second = randn(2, 6, 3, 8, 8, seed=seed)
    return Views([first, second], torch.arange(6), torch.full((6,), -1))


def test_loss_is_symmetric_and_queries_alone_pass_the_predictor() -> None:
    method, given = make(), views()
    out = method(given)
    z = [method.branch(view)[1] for view in given.views]
    q = [method.predictor(each).detach().numpy() for each in z]
    k = [method.key_branch(view)[1].detach().numpy() for view in given.views]
    assert out.loss.item() == pytest.approx(paper(q[0], k[1], 0.2) + paper(q[1], k[0], 0.2), rel=1e-10)
    assert sum(term.item() for term in out.terms.values()) == pytest.approx(out.loss.item(), rel=1e-10)
    torch.testing.assert_close(out.embedding, z[0].detach())
    out.loss.backward()
    assert all(p.grad is None for p in method.key_branch.parameters())
    assert all(p.grad is not None for part in (method.branch, method.predictor) for p in part.parameters())


def test_heads_end_with_a_norm_without_parameters() -> None:
    method = make(projector=(32, 16, 8))
    names = [type(layer).__name__ for layer in method.branch.projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    for head, widths in (
        (method.branch.projector, [(32, 512), (16, 32), (8, 16)]),
        (method.predictor, [(12, 8), (8, 12)]),
    ):
        assert [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)] == widths
        assert not head[-1].affine


def test_the_key_network_is_the_moving_average_of_the_query_network() -> None:
    method = make(momentum=MomentumConfig(tau=0.9, final=1.0))
    before = [p.clone() for p in method.key_branch.parameters()]
    with torch.no_grad():
        for parameter in method.branch.parameters():
            parameter.add_(1.0)
    method.after_step(Progress(5, 10))  # half of the way from 0.9 to 1
    for key, query, old in zip(method.key_branch.parameters(), method.branch.parameters(), before, strict=True):
        torch.testing.assert_close(key, 0.95 * old + 0.05 * query)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"batch_size": 1}}, r"leaves 1 image, and MoCo v3 contrasts it"),
        ({"method": {"name": "mocov3", "momentum": None}}, "valid"),
        ({"method": {"name": "mocov3", "projector": []}}, "at least 1"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate({"data": "somewhere", "method": {"name": "mocov3"}, **changes})
