"""On two workers every method's loss, gradient and steps are those of one process with the whole batch.

In float64, relative error under 1e-10, through the networks with their synchronised batch norms. A new method adds a
row to `CASES`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jem.batch import Views
from jem.config import BackboneConfig, MethodConfig, SupervisedConfig, VICRegConfig
from jem.distributed import convert_sync_batchnorm, gather, rank, world
from jem.methods import Method, build_method
from tests.processes import run_on

# zero_init would leave most of the gradient zero at the first step
CIFAR = BackboneConfig(stem="cifar", zero_init=False)
STRIDE = BackboneConfig(stem="stride2", zero_init=False)
BATCH, SIDE, STEPS = 12, 8, 2

CASES: dict[str, MethodConfig] = {
    "vicreg": VICRegConfig(expander=(16, 8)),
    "vicreg, embedding wider than the batch": VICRegConfig(expander=(16, 32)),
    "vicreg, separate branches": VICRegConfig(expander=(16, 8), branches="separate"),
    "vicreg, two architectures": VICRegConfig(expander=(16, 8), branches=(STRIDE, CIFAR)),
    "supervised": SupervisedConfig(label_smoothing=0.1),
}


def views(step: int) -> Views:
    generator = torch.Generator().manual_seed(step)
    first, second = (torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    # the labels that are missing (-1) are more on one worker than on the other
    label = torch.arange(BATCH) % 4
    label[:3] = -1
    return Views([first, second], torch.arange(BATCH), label)


def mine(whole: Views) -> Views:
    def part(x: Tensor) -> Tensor:
        return x.chunk(world())[rank()]

    return Views([part(view) for view in whole.views], part(whole.id), part(whole.label))


def train(config: MethodConfig) -> dict[str, Any]:
    """A few steps: losses and terms of each, the first gradient, the last buffers."""
    torch.manual_seed(0)
    method = build_method(config, STRIDE, 4).double()
    assert isinstance(method, Method)
    learner: torch.nn.Module = method
    if world() > 1:
        learner = DistributedDataParallel(convert_sync_batchnorm(method))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    result: dict[str, Any] = {"losses": [], "terms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        out = learner(mine(views(step)))
        out.loss.backward()
        if step == 0:
            gradient = {name: p.grad.clone() for name, p in method.named_parameters()}
            result["embedding"], result["representation"] = out.embedding, out.representation
        optimizer.step()
        result["losses"].append(out.loss.item())
        result["terms"].append({name: term.item() for name, term in out.terms.items()})
    # every worker has the first one's, which are many megabytes: send them once
    result["alike"] = all(
        each.equal(gather(each[None])[0]) for each in [*gradient.values(), *method.state_dict().values()]
    )
    if rank() == 0:
        result |= {"gradient": gradient, "buffers": dict(method.named_buffers())}
    return result


def train_all() -> dict[str, dict[str, Any]]:
    return {name: train(config) for name, config in CASES.items()}


@pytest.fixture(scope="module")
def workers() -> list[dict[str, dict[str, Any]]]:
    return run_on(2, train_all, deadline=300.0)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_are_one_process_with_the_whole_batch(workers: list[dict[str, dict[str, Any]]], name: str) -> None:
    one = train(CASES[name])
    results = [worker[name] for worker in workers]
    for parameter, expected in one["gradient"].items():
        assert expected.norm() > 0, f"{parameter} has no gradient to compare"
        assert relative(results[0]["gradient"][parameter], expected) < 1e-10, parameter
    for buffer, expected in one["buffers"].items():
        assert relative(results[0]["buffers"][buffer].double(), expected.double()) < 1e-10, buffer
    for two in results:
        assert two["alike"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-10)
        for found, expected in zip(two["terms"], one["terms"], strict=True):
            assert found == pytest.approx(expected, rel=1e-10, abs=1e-14)
    for key in ("embedding", "representation"):
        assert relative(torch.cat([two[key] for two in results]), one[key]) < 1e-10
