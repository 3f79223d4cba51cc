"""What holds for every method: two workers are one process with the whole batch, and a checkpoint is complete.

In float64, relative error under 1e-10, through the networks with their synchronised batch norms. A new method adds a
row to `tests/methods/cases.py`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jem.config import METHODS
from jem.distributed import convert_sync_batchnorm, gather, rank, world
from tests.methods.cases import CASES, STEPS
from tests.processes import run_on


def train(name: str) -> dict[str, Any]:
    """A few steps: losses and terms of each, one step's gradient, the last state."""
    case = CASES[name]
    method = case.build()
    learner: torch.nn.Module = method
    if world() > 1:
        learner = DistributedDataParallel(convert_sync_batchnorm(method), broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    result: dict[str, Any] = {"losses": [], "terms": []}
    for step in range(STEPS):
        out, gradient = case.step(learner, method, optimizer, step)
        if step == case.gradient_at:
            result |= {"embedding": out.embedding, "representation": out.representation}
            kept = gradient
        result["losses"].append(out.loss.item())
        result["terms"].append({name: term.item() for name, term in out.terms.items()})
    # every worker has the first one's, which are many megabytes: send them once
    state = dict(method.state_dict())
    result["unlike"] = [
        key for key, each in {**kept, **state}.items() if not each.equal(gather(each[None].contiguous())[0])
    ]
    if rank() == 0:
        result |= {"gradient": kept, "state": state}
    return result


def train_all() -> dict[str, dict[str, Any]]:
    return {name: train(name) for name in CASES}


@pytest.fixture(scope="module")
def workers() -> list[dict[str, dict[str, Any]]]:
    return run_on(2, train_all, deadline=600.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that two threads only wait for each other, minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(found: Tensor, expected: Tensor, least: float = 1e-300) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(least)).item()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_are_one_process_with_the_whole_batch(workers: list[dict[str, dict[str, Any]]], name: str) -> None:
    case, one = CASES[name], train(name)
    results = [worker[name] for worker in workers]
    for parameter, expected in one["gradient"].items():
        if not parameter.startswith(case.without_gradient or "-"):
            assert expected.norm() > 0, f"{parameter} has no gradient to compare"
        assert relative(results[0]["gradient"][parameter], expected) < 1e-10, parameter
    for key, expected in one["state"].items():
        # a running mean of what a norm has centred is 0 but for rounding
        assert relative(results[0]["state"][key], expected, least=1e-4) < 1e-10, key
    for two in results:
        assert two["unlike"] == []
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-10)
        for found, expected in zip(two["terms"], one["terms"], strict=True):
            assert found == pytest.approx(expected, rel=1e-10, abs=1e-14)
    for key in ("embedding", "representation"):
        assert relative(torch.cat([two[key] for two in results]), one[key]) < 1e-10


def test_every_method_has_a_case() -> None:
    assert {case.config.name for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", list(CASES))
def test_a_checkpoint_is_complete(name: str) -> None:
    """A method that is restored from its state dictionary goes on as if it had not stopped, bit for bit."""
    case = CASES[name]
    through = case.build()
    optimizer = torch.optim.SGD([p for p in through.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS - 1):
        case.step(through, through, optimizer, step)
    stored = io.BytesIO()
    torch.save(through.state_dict(), stored)
    stored.seek(0)
    resumed = case.build()
    with torch.no_grad():
        for each in (*resumed.parameters(), *resumed.buffers()):  # what the checkpoint lacks would be seen
            each.fill_(float("nan") if each.is_floating_point() else 1)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    second = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.01)
    expected, _ = case.step(through, through, optimizer, STEPS - 1)
    found, _ = case.step(resumed, resumed, second, STEPS - 1)
    assert found.loss.equal(expected.loss)
    for key, value in through.state_dict().items():
        assert resumed.state_dict()[key].equal(value), key
