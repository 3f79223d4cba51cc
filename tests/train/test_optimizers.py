"""Optimizers move weights as their papers' code does, and groups treat biases and norms apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jem.config import AdamWConfig, BackboneConfig, LARSConfig, OptimizerConfig, SGDConfig, VICRegConfig
from jem.methods import build_method
from jem.train.optimizers import LARS, build_optimizer, parameter_groups, set_rates

CONFIGS: list[OptimizerConfig] = [LARSConfig(), LARSConfig(clip=True), SGDConfig(nesterov=True), AdamWConfig()]


def reference_lars(weights, gradients, rates, decay, momentum, eta, clip, adapt):
    """The dialect of METHODS, on one array: its value after each gradient."""
    w, m, path = weights.copy(), np.zeros_like(weights), []
    for g, lr in zip(gradients, rates, strict=True):
        u = g + decay * w
        norm_w, norm_u = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
        if adapt and norm_w > 0 and norm_u > 0:
            q = eta * norm_w / norm_u
            if clip:
                q = 1.0 if lr == 0 else min(q / lr, 1.0)
            u = q * u
        m = momentum * m + u
        w = w - lr * m
        path.append(w)
    return path


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_lars_is_the_reference(clip: bool, start: float) -> None:
    rng = np.random.default_rng(0)
    rates = [0.0, 0.02, 0.3, 0.2, 0.001, 0.1]  # a warm-up begins at 0
    shapes = [((3, 4), True), ((5, 2, 2), True), ((6,), False), ((3,), False)]
    weights = [start * rng.normal(size=shape) for shape, _ in shapes]
    gradients = [[rng.normal(size=shape) * scale for scale in (1, 5, 0.1, 0.01, 0, 1)] for shape, _ in shapes]
    parameters = [nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = LARS(
        [
            {"params": parameters[:2], "weight_decay": 0.05},
            {"params": parameters[2:], "weight_decay": 0.0, "adapt": False},
        ],
        lr=1.0,
        momentum=0.8,
        eta=0.02,
        clip=clip,
    )
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, steps in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(steps[step])
        optimizer.step()
        for parameter, weight, steps, (_, adapt) in zip(parameters, weights, gradients, shapes, strict=True):
            decay = 0.05 if adapt else 0.0
            expected = reference_lars(weight, steps, rates, decay, 0.8, 0.02, clip, adapt)[step]
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_lars_leaves_gradients_and_parameters_without_one_alone() -> None:
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.full((2, 2), 3.0)
    optimizer = LARS([moved, still], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(moved.grad, torch.full((2, 2), 3.0))
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))
    assert still not in optimizer.state


def test_lars_runs_a_closure() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert LARS([weight], lr=0.1).step(closure) == 4
    assert weight.grad is not None


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_method(VICRegConfig(expander=(16, 8), branches="separate"), BackboneConfig(), None)


def test_biases_and_norms_are_neither_decayed_nor_scaled() -> None:
    module = model()
    decayed, rest = parameter_groups(module, 0.1)
    owners = {id(p): layer for layer in module.modules() for p in layer.parameters(recurse=False)}
    assert {type(owners[id(p)]) for p in decayed["params"]} == {nn.Conv2d, nn.Linear}
    assert {type(owners[id(p)]) for p in rest["params"]} == {nn.BatchNorm2d, nn.BatchNorm1d}
    assert (decayed["weight_decay"], decayed["decay"], decayed["adapt"]) == (0.1, True, True)
    assert (rest["weight_decay"], rest["decay"], rest["adapt"]) == (0.0, False, False)
    everything = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in module.parameters())


def test_a_linear_layers_bias_is_not_decayed_and_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 3)
    assert [group["params"][0] is p for group, p in zip(parameter_groups(layer, 0.1), layer.parameters(), strict=True)]
    assert [p is layer.bias for p in parameter_groups(layer, 0.1)[1]["params"]] == [True]
    layer.bias.requires_grad_(False)
    assert [group["decay"] for group in parameter_groups(layer, 0.1)] == [True]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_configured_optimizer_takes_its_settings_and_the_scaled_rate(config: OptimizerConfig) -> None:
    optimizer = build_optimizer(model(), config, lr=0.7)
    assert type(optimizer).__name__.lower() == config.name
    decayed, rest = optimizer.param_groups
    settings = config.model_dump(exclude={"name", "lr", "weight_decay"})
    for group in (decayed, rest):
        assert group["lr"] == 0.7
        assert {key: group[key] for key in settings} == settings
    assert (decayed["weight_decay"], rest["weight_decay"]) == (config.weight_decay, 0)
    set_rates(optimizer, lr=0.2, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.3), (0.2, 0.0)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_state_dictionary_goes_on_to_the_bit(config: OptimizerConfig, tmp_path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
        for step in range(start, stop):
            set_rates(optimizer, 0.1 / (step + 1), config.weight_decay)
            optimizer.zero_grad()
            module(torch.full((3, 4), float(step)).cumsum(0)).square().sum().backward()
            optimizer.step()

    through = network()
    steps(through, build_optimizer(through, config, 0.1), 0, 6)
    first = network()
    optimizer = build_optimizer(first, config, 0.1)
    steps(first, optimizer, 0, 3)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    second = network()
    second.load_state_dict(saved["model"])
    optimizer = build_optimizer(second, config, 0.1)
    optimizer.load_state_dict(saved["optimizer"])
    steps(second, optimizer, 3, 6)
    for name, value in through.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
