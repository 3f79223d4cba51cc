"""MoCo's loss, its keys, its queue and its key network are the paper's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from jem.batch import Views
from jem.config import BackboneConfig, MoCoConfig, MomentumConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.moco import MoCo, moco_loss

SMALL = BackboneConfig(stem="stride2", zero_init=False)
CONSTANT = MomentumConfig(tau=0.9, schedule="constant")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def views(n: int = 8, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Views([first, second], torch.arange(n), torch.full((n,), -1))


def make(**settings: Any) -> MoCo:
    torch.manual_seed(0)
    settings = {"projector": (16, 4), "queue": 16, "norm_groups": 2, "momentum": CONSTANT, **settings}
    method = build_method(MoCoConfig(**settings), SMALL).double()
    assert isinstance(method, MoCo)
    return method


def step(method: MoCo, number: int, given: Views, parts: int = 1, lr: float = 0.1) -> Tensor:
    """One step; its loss, of the last part."""
    method.before_step(Progress(number, 10))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    for part in range(parts):
        images = [view.chunk(parts)[part] for view in given.views]
        out = method(Views(images, given.id.chunk(parts)[part], given.label.chunk(parts)[part]))
        out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(Progress(number + 1, 10))
    return out.loss.detach()


# --- the loss -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), d=st.integers(1, 6), size=st.integers(1, 9), temperature=st.floats(0.07, 2))
def test_loss_is_the_papers(n: int, d: int, size: int, temperature: float) -> None:
    q, k, queue = unit(n, d, seed=1), unit(n, d, seed=2), unit(size, d, seed=3)
    total = 0.0
    for i in range(n):
        positive = math.exp(float(np.dot(q[i], k[i])) / temperature)
        negatives = sum(math.exp(float(np.dot(q[i], queue[j])) / temperature) for j in range(size))
        total -= math.log(positive / (positive + negatives))
    attraction, repulsion = moco_loss(q, k, queue, temperature)
    assert (attraction + repulsion).item() == pytest.approx(total / n, rel=1e-10, abs=1e-12)


def test_the_negatives_are_the_queue_before_this_batch() -> None:
    method, given = make(norm_groups=1), views()
    before = method.queue.rows.clone()
    z1, z2 = method.branch(given.views[0])[1], method.key_branch(given.views[1])[1]
    expected = sum(moco_loss(functional.normalize(z1, dim=1), functional.normalize(z2, dim=1), before, 0.2))
    close(step(method, 0, given), expected.detach())
    close(method.queue.rows[:8], functional.normalize(z2, dim=1).detach())
    assert torch.equal(method.queue.rows[8:], before[8:])


def test_symmetric_is_the_mean_of_both_directions_and_queues_both_views_keys() -> None:
    method, given = make(norm_groups=1, symmetric=True, queue=32), views()
    queue = method.queue.rows.clone()
    queries, keys = (
        [functional.normalize(network(view)[1], dim=1).detach() for view in given.views]
        for network in (method.branch, method.key_branch)
    )
    both = [sum(moco_loss(q, k, queue, 0.2)) for q, k in zip(queries, reversed(keys), strict=True)]
    close(step(method, 0, given), (both[0] + both[1]) / 2)
    close(method.queue.rows[:16], torch.cat([keys[1], keys[0]]))


# --- the queue ----------------------------------------------------------------------------------------------------


def test_the_queue_starts_with_random_unit_rows_and_replaces_the_oldest() -> None:
    method = make(norm_groups=1)
    assert method.queue.rows.std() > 0.1
    close(method.queue.rows.norm(dim=1), torch.ones(16, dtype=torch.float64), rtol=1e-6, atol=0)
    seen = []
    for number in range(3):
        given = views(seed=number)
        seen.append(functional.normalize(method.key_branch(given.views[1])[1], dim=1).detach())
        step(method, number, given)
    close(method.queue.rows, torch.cat([seen[2], seen[1]]))
    assert method.queue.place == 8


def test_parts_of_an_accumulated_batch_all_join_the_queue_after_the_step() -> None:
    method, given = make(norm_groups=1), views()
    keys = [functional.normalize(method.key_branch(part)[1], dim=1).detach() for part in given.views[1].chunk(2)]
    step(method, 0, given, parts=2)
    close(method.queue.rows[:8], torch.cat(keys))
    assert method.pending == []


# --- the key network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [CONSTANT, MomentumConfig(tau=0.9, final=1.0), MomentumConfig(tau=0.0)])
def test_the_key_network_is_the_moving_average_of_the_query_network(momentum: MomentumConfig) -> None:
    method = make(momentum=momentum)
    before = [p.clone() for p in method.key_branch.parameters()]
    step(method, 0, views())
    tau = momentum.tau if momentum.schedule == "constant" else 1 - (1 - momentum.tau) * (1 + math.cos(math.pi / 10)) / 2
    pairs = zip(method.key_branch.parameters(), method.branch.parameters(), before, strict=True)
    for key, query, old in pairs:
        close(key, tau * old + (1 - tau) * query)
        assert not key.requires_grad
        assert key.grad is None
    buffers = list(zip(method.key_branch.buffers(), method.branch.buffers(), strict=True))
    assert buffers
    assert all(torch.equal(key, query) for key, query in buffers)


def test_without_momentum_the_keys_come_from_the_online_network_itself() -> None:
    memory_bank, m0 = make(momentum=None), make(momentum=MomentumConfig(tau=0.0, schedule="constant"))
    online = {id(p) for p in memory_bank.branch.parameters()}
    assert {id(p) for p in memory_bank.key_branch.parameters()} == online
    assert len(list(memory_bank.parameters())) == len(online)
    for number in range(2):  # which is what a momentum of 0 is
        close(step(memory_bank, number, views(seed=number)), step(m0, number, views(seed=number)))
    close(memory_bank.queue.rows, m0.queue.rows)


def test_a_slow_key_network_keeps_old_keys_valid_and_a_memory_bank_lets_them_grow_stale() -> None:
    """How far this step's key network is from the queue's first keys, for the same images."""

    def drift(momentum: MomentumConfig | None) -> float:
        method, first = make(momentum=momentum, norm_groups=1), views()
        step(method, 0, first, lr=0.001)
        kept = method.queue.rows[:8].clone()
        step(method, 1, views(seed=1), lr=0.001)
        again = functional.normalize(method.key_branch(first.views[1])[1], dim=1)
        return (again - kept).norm(dim=1).mean().item()

    assert drift(MomentumConfig(tau=0.99, schedule="constant")) < 0.2 * drift(None)


def test_keys_are_normalised_in_shuffled_groups() -> None:
    method, images = make(norm_groups=4), views().views[1]
    method.before_step(Progress(3, 10))
    found = method.keys(images, None)
    order = torch.randperm(8, generator=Progress(3, 10).generator())
    expected = torch.empty_like(found)
    for group in order.view(4, 2):  # what shares statistics is a pair that was drawn
        expected[group] = functional.normalize(method.key_branch(images[group])[1], dim=1).detach()
    close(found, expected)
    close(found.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert not torch.allclose(found, functional.normalize(method.key_branch(images)[1], dim=1))
    assert not found.requires_grad


def test_groups_change_from_step_to_step_and_a_repeated_step_draws_the_same() -> None:
    method, images = make(norm_groups=4), views().views[1]

    def keys(number: int) -> Tensor:
        method.before_step(Progress(number, 10))
        return method.keys(images, None)

    assert torch.equal(keys(1), keys(1))
    assert not torch.allclose(keys(1), keys(2))


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "train", "workers", "words"),
    [
        ({"queue": 1000}, {}, 1, r"queue 1000 is not a multiple of 256.*make it 1024"),
        ({"queue": 128}, {}, 1, "make it 256"),
        ({"queue": 256, "symmetric": True}, {}, 1, r"multiple of 512.*x 2, symmetric.*make it 512"),
        ({"norm_groups": 3}, {}, 2, r"norm_groups 3 does not divide among cluster.workers 2"),
        ({"norm_groups": 2}, {}, 4, "make it a multiple of 4, or 1 for no shuffling"),
        ({"norm_groups": 6}, {}, 1, "equal groups of at least 2 images"),
        ({"norm_groups": 256}, {}, 1, "equal groups of at least 2 images"),
        ({"norm_groups": 64}, {"accumulate": 4}, 1, r"batch_size 256 in 4 part\(s\)"),
    ],
)
def test_what_cannot_work_is_refused(method: dict[str, Any], train: dict[str, Any], workers: int, words: str) -> None:
    run = {"data": "x", "method": {"name": "moco", **method}, "train": train, "cluster": {"workers": workers}}
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate(run)


def test_what_can_work_is_not_refused() -> None:
    for method, workers in (
        ({"norm_groups": 1, "momentum": None}, 4),
        ({"norm_groups": 4}, 4),
        ({"queue": 512, "symmetric": True, "norm_groups": 128}, 1),
    ):
        PretrainConfig.model_validate(
            {"data": "x", "method": {"name": "moco", **method}, "cluster": {"workers": workers}}
        )
