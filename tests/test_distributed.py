"""What several workers compute together equals what one computes with the whole batch."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jem.distributed import (
    SyncBatchNorm,
    all_reduce_mean,
    all_reduce_sum,
    convert_sync_batchnorm,
    gather,
    keep_batch_norm_local,
    rank,
    world,
)
from tests.processes import RankError, run_on


def batch(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(x: Tensor) -> Tensor:
    return x.chunk(world())[rank()].clone()


def whole(x: Tensor) -> Tensor:
    """A function of the whole batch in which every row meets every other."""
    return (x @ x.T).tanh().sum() + x.prod(dim=1).sum()


# --- collectives --------------------------------------------------------------------------------------------------


def collectives() -> dict[str, object]:
    leaf = mine(batch(6, 3)).requires_grad_()
    gathered = gather(leaf)
    # each worker's own loss: the gradient must be that of their sum
    ((rank() + 1) * whole(gathered)).backward()
    summed = mine(batch(6, 3)).requires_grad_()
    total = all_reduce_sum(summed.square())
    ((rank() + 1) * total.sin().sum()).backward()
    return {
        "gathered": gathered.detach(),
        "gather": leaf.grad,
        "labels": gather(torch.tensor([rank(), 7])),
        "total": total.detach(),
        "sum": summed.grad,
        "mean": all_reduce_mean(torch.tensor([float(rank())])),
        "place": (rank(), world()),
    }


def test_collectives_sum_the_gradients_of_all_workers_losses() -> None:
    results = run_on(2, collectives)
    x = batch(6, 3).requires_grad_()
    (3 * whole(x)).backward()  # 1 + 2, the workers' factors
    y = batch(6, 3).requires_grad_()
    first, second = y.chunk(2)
    total = first.square() + second.square()
    (3 * total.sin().sum()).backward()
    for place, result in enumerate(results):
        assert result["place"] == (place, 2)
        assert torch.equal(result["gathered"], batch(6, 3))
        torch.testing.assert_close(result["gather"], x.grad.chunk(2)[place], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["total"], total.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["sum"], y.grad.chunk(2)[place], rtol=1e-12, atol=1e-12)
        assert result["labels"].tolist() == [0, 7, 1, 7]
        assert result["mean"].item() == 0.5


def test_without_a_process_group_everything_is_the_identity() -> None:
    x = batch(4, 2)
    assert (rank(), world()) == (0, 1)
    assert gather(x) is x
    assert all_reduce_sum(x) is x
    assert torch.equal(all_reduce_mean(x), x)


# --- batch norm ---------------------------------------------------------------------------------------------------

LAYERS = {
    "2d": partial(nn.BatchNorm2d, 5),
    "1d": partial(nn.BatchNorm1d, 5),
    "plain": partial(nn.BatchNorm1d, 5, affine=False),
}
SHAPES = {"2d": (5, 3, 2), "1d": (5,), "plain": (5,)}


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(1)
    layers = LAYERS[kind]
    model = nn.Sequential(layers(), nn.Tanh(), layers(momentum=None)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def batch_norm_step(kind: str, split: list[int]) -> dict[str, object]:
    """One step on this worker's rows of 8, which the workers hold in the numbers given; then an evaluation."""
    x = batch(8, *SHAPES[kind]) * 3 + 5
    x = x.split(split)[rank()] if world() > 1 else x
    x = x.clone().requires_grad_()
    model = convert_sync_batchnorm(network(kind))
    out = model(x)
    (world() * out.square().tanh().sum()).backward()  # what DistributedDataParallel would average
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "out": out.detach(),
        "input": x.grad / world(),
        "parameters": [all_reduce_mean(grad) for grad in gradients],
        "state": model.state_dict(),
        "evaluated": model.eval()(x).detach(),
        "classes": [type(layer).__name__ for layer in model],
    }


def batch_norm_cases() -> list[dict[str, object]]:
    return [batch_norm_step(kind, split) for kind in LAYERS for split in ([4, 4], [2, 6])]


def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch() -> None:
    results = run_on(2, batch_norm_cases)
    for number, (kind, _) in enumerate((kind, split) for kind in LAYERS for split in range(2)):
        x = (batch(8, *SHAPES[kind]) * 3 + 5).requires_grad_()
        model = network(kind)
        out = model(x)
        out.square().tanh().sum().backward()
        first, second = (result[number] for result in results)
        close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
        close(torch.cat([first["out"], second["out"]]), out.detach())
        close(torch.cat([first["input"], second["input"]]), x.grad)
        for mine_, reference in zip(first["parameters"], model.parameters(), strict=True):
            close(mine_, reference.grad)
        assert list(first["state"]) == list(model.state_dict())
        for name, value in model.state_dict().items():
            close(first["state"][name], value)
            assert torch.equal(first["state"][name], second["state"][name])
        close(torch.cat([first["evaluated"], second["evaluated"]]), model.eval()(x).detach())
        assert first["classes"] == ["SyncBatchNorm", "Tanh", "SyncBatchNorm"]


def test_on_one_worker_synchronised_batch_norm_is_torchs_to_the_bit() -> None:
    reference, converted = network("2d"), convert_sync_batchnorm(network("2d"))
    x = batch(8, 5, 3, 2)
    assert torch.equal(reference(x), converted(x))
    assert torch.equal(reference.eval()(x), converted.eval()(x))


def test_conversion_keeps_parameters_buffers_and_the_rest() -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "norm": nn.BatchNorm1d(4)})
    parameters, names = set(model.parameters()), list(model.state_dict())
    model["norm"].eval()
    converted = convert_sync_batchnorm(model)
    assert converted is model
    assert set(model.parameters()) == parameters
    assert list(model.state_dict()) == names
    assert isinstance(model["inner"][1], SyncBatchNorm)
    assert [module.training for module in (model["inner"][1], model["norm"])] == [True, False]
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm2d(3)), SyncBatchNorm)


class OnGPU(nn.Parameter):
    """A weight that says that it is on a GPU, which decides who converts its batch norm."""

    is_cuda = True


def norm(weight: type[nn.Parameter]) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(4)
    layer.weight = weight(layer.weight.detach())
    return layer


@pytest.mark.parametrize(("weight", "converted"), [(nn.Parameter, SyncBatchNorm), (OnGPU, nn.SyncBatchNorm)])
def test_conversion_passes_over_what_is_kept_local(weight: type[nn.Parameter], converted: type[nn.Module]) -> None:
    key = nn.Sequential(nn.Sequential(norm(weight)), norm(weight))
    model = nn.ModuleDict({"query": nn.Sequential(norm(weight)), "key": key})
    assert keep_batch_norm_local(key) is key
    convert_sync_batchnorm(model)
    assert type(model["query"][0]) is converted
    assert {type(key[0][0]), type(key[1])} == {nn.BatchNorm1d}
    lone = keep_batch_norm_local(norm(weight))
    assert convert_sync_batchnorm(lone) is lone


def test_batch_norm_refuses_one_dimension() -> None:
    with pytest.raises(ValueError, match="not 1 dimensions"):
        SyncBatchNorm(3)(torch.zeros(3))


def half_precision() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = (torch.randn(64, 4, 6, 6) * 0.1 + 20).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    leaf = mine(x).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4))
    out = layer(leaf)
    out.float().square().tanh().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out.detach().float(), leaf.grad.float(), layer.running_var


def test_statistics_of_half_precision_are_taken_in_float32() -> None:
    """A mean of 20 with a spread of 0.1 has no variance left in bfloat16."""
    torch.manual_seed(0)
    x = (torch.randn(64, 4, 6, 6) * 0.1 + 20).to(torch.bfloat16)
    leaf = x.double().requires_grad_()
    reference = nn.BatchNorm2d(4).double()
    out = reference(leaf)
    out.square().tanh().sum().backward()
    results = run_on(2, half_precision)
    ours, gradient = (torch.cat([result[i] for result in results]).double() for i in (0, 1))
    torch.testing.assert_close(ours, out.detach(), rtol=0.01, atol=0.01)
    # both workers' losses reach each slice, hence no factor; bfloat16 keeps 8 bits
    assert (gradient - leaf.grad).norm() / leaf.grad.norm() < 0.02
    torch.testing.assert_close(results[0][2].double(), reference.running_var, rtol=1e-4, atol=1e-5)


# --- the harness --------------------------------------------------------------------------------------------------


def fail_on(bad: int) -> None:
    if rank() == bad:
        raise KeyError("the cause")
    gather(torch.zeros(1))


def die_on(bad: int) -> None:
    if rank() == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    gather(torch.zeros(1))


def never_meet() -> None:
    if rank() == 0:
        gather(torch.zeros(1))
    else:
        signal.pause()


def test_a_ranks_own_traceback_is_raised() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*in fail_on.*KeyError: 'the cause'"):
        run_on(2, fail_on, 1)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"rank \d"):
        run_on(2, die_on, 0)


def test_a_deadline_ends_ranks_that_wait_for_ever() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 were not done"):
        run_on(2, never_meet, deadline=1.0)


def averaged_gradient() -> Tensor:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2).double())
    whole(gather(model(mine(batch(6, 3))))).backward()
    gradient = model.module.weight.grad
    assert gradient is not None
    return gradient


def test_averaged_gradient_of_a_gathered_loss_is_that_of_one_process() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    whole(model(batch(6, 3))).backward()
    for gradient in run_on(2, averaged_gradient):
        torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-12, atol=1e-12)
