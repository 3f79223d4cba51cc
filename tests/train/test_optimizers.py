"""Optimizers move weights as their papers' code does, and groups treat biases and norms apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jem.config import (
    AdamConfig,
    AdamWConfig,
    BackboneConfig,
    LARSConfig,
    OptimizerConfig,
    SGDConfig,
    SupervisedConfig,
    VICRegConfig,
)
from jem.methods import Method, StepOutput, build_method
from jem.train.optimizers import LARS, build_optimizer, parameter_groups, restore, set_rates

CONFIGS: list[OptimizerConfig] = [
    LARSConfig(),
    LARSConfig(clip=True),
    SGDConfig(nesterov=True),
    AdamConfig(betas=(0.8, 0.9)),
    AdamWConfig(),
]


class Holder(Method):
    """A method that is nothing but its `layers`; those of `still` have a constant rate."""

    def __init__(self, layers: nn.Module, still: tuple[nn.Module, ...] = ()) -> None:
        super().__init__(SupervisedConfig())
        self.layers = layers
        self.still = still

    @property
    def backbone(self):
        raise AssertionError("not asked for")

    def forward(self, views) -> StepOutput:
        raise AssertionError("not asked for")

    def constant_rate(self):
        return self.still


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


def model() -> Method:
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
    decayed, rest = parameter_groups(Holder(layer), 0.1)
    assert [p is layer.weight for p in decayed["params"]] == [True]
    assert [p is layer.bias for p in rest["params"]] == [True]
    layer.bias.requires_grad_(False)
    assert [group["decay"] for group in parameter_groups(Holder(layer), 0.1)] == [True]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_configured_optimizer_takes_its_settings_and_the_scaled_rate(config: OptimizerConfig) -> None:
    optimizer = build_optimizer(model(), config, lr=0.7)
    assert type(optimizer).__name__.lower() == config.name
    decayed, rest = optimizer.param_groups
    settings = config.model_dump(exclude={"name", "lr", "bias_lr", "weight_decay"})
    for group in (decayed, rest):
        assert group["lr"] == 0.7
        assert {key: group[key] for key in settings} == settings
    assert (decayed["weight_decay"], rest["weight_decay"]) == (config.weight_decay, 0)
    set_rates(optimizer, lr=0.2, peak=0.7, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.3), (0.2, 0.0)]


def rates(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, float]:
    """The rate of each of the module's parameters."""
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters()}


def test_biases_and_norms_may_have_a_rate_of_their_own() -> None:
    """`lr` is scaled with the batch before it gets here, and the schedule moves it; bias_lr follows both."""
    layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    config = LARSConfig(lr=0.2, bias_lr=0.0048)
    optimizer = build_optimizer(Holder(layers), config, lr=8 * 0.2)
    assert rates(optimizer, layers) == pytest.approx(
        {"0.weight": 1.6, "0.bias": 8 * 0.0048, "1.weight": 8 * 0.0048, "1.bias": 8 * 0.0048}
    )
    set_rates(optimizer, lr=0.4, peak=1.6, weight_decay=0.1)
    found = rates(optimizer, layers)
    assert found == pytest.approx({"0.weight": 0.4, "0.bias": 0.0096, "1.weight": 0.0096, "1.bias": 0.0096})
    still = build_optimizer(Holder(layers), LARSConfig(lr=0.2, bias_lr=0.0), lr=0.2)
    assert rates(still, layers)["0.bias"] == 0


def test_parts_of_constant_rate_stay_at_the_highest_and_the_rest_follows_the_schedule() -> None:
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    config = LARSConfig(lr=0.2, bias_lr=0.1, weight_decay=0.01)
    optimizer = build_optimizer(Holder(layers, still=(layers[1],)), config, lr=0.8)
    for lr in (0.0, 0.3):
        set_rates(optimizer, lr=lr, peak=0.8, weight_decay=0.05)
        assert rates(optimizer, layers) == pytest.approx(
            {"0.weight": lr, "0.bias": lr / 2, "1.weight": 0.8, "1.bias": 0.4}
        )
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert [decays[id(p)] for p in layers.parameters()] == [0.05, 0.0, 0.05, 0.0]
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in layers.parameters())


def test_adams_weight_decay_is_a_part_of_the_gradient_and_adamws_is_not() -> None:
    """Adam's first step is lr times the sign of what it takes for the gradient, whatever its size."""
    ends = {}
    for config in (AdamConfig(weight_decay=0.5), AdamWConfig(weight_decay=0.5)):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        layer.weight.grad = torch.full((1, 1), -0.1)
        build_optimizer(Holder(layer), config, lr=0.01).step()
        ends[config.name] = layer.weight.item()
    # -0.1 + 0.5 * 2 > 0: down; AdamW: 2 (1 - 0.01 * 0.5), then up
    assert ends == pytest.approx({"adam": 2 - 0.01, "adamw": 2 * 0.995 + 0.01}, abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_state_dictionary_goes_on_to_the_bit(config: OptimizerConfig, tmp_path) -> None:
    def network() -> Holder:
        torch.manual_seed(0)
        last = nn.Linear(8, 2)
        return Holder(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), last), still=(last,))

    def steps(method: Holder, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
        for step in range(start, stop):
            set_rates(optimizer, 0.1 / (step + 1), 0.1, config.weight_decay)
            optimizer.zero_grad()
            method.layers(torch.full((3, 4), float(step)).cumsum(0)).square().sum().backward()
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
    restore(optimizer, saved["optimizer"])
    steps(second, optimizer, 3, 6)
    for name, value in through.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


class Convolutions(Holder):
    """A convolution whose weight lies in memory with the channels last, and one that begins to move at its own time."""

    def __init__(self, layout: torch.memory_format = torch.channels_last) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).double().to(memory_format=layout))

    def steps(self, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
            self.layers(images).square().sum().backward()
            if step < 2:
                self.layers[1].weight.grad = None
            optimizer.step()
            optimizer.zero_grad()


def plain(method: Method, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, one weight after the other, as torch has always had it."""
    groups = parameter_groups(method, config.weight_decay)
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(groups, 0.01, momentum=config.momentum, nesterov=config.nesterov, foreach=False)
    assert isinstance(config, AdamConfig | AdamWConfig)
    kind = torch.optim.Adam if isinstance(config, AdamConfig) else torch.optim.AdamW
    return kind(groups, 0.01, betas=config.betas, foreach=False)


TORCHS = [SGDConfig(), SGDConfig(nesterov=True), SGDConfig(momentum=0.0), AdamConfig(), AdamWConfig()]


@pytest.mark.parametrize("config", TORCHS, ids=lambda config: f"{config.name}")
def test_one_kernel_moves_all_weights_as_torch_moves_one_after_the_other(config: OptimizerConfig) -> None:
    """Also where a layer stands still at first, and whatever way the weights lie in memory."""
    fused, single = Convolutions(), Convolutions()
    optimizer = build_optimizer(fused, config, 0.01)
    assert all(group["fused"] for group in optimizer.param_groups)
    fused.steps(optimizer, 0, 5)
    single.steps(plain(single, config), 0, 5)
    for (name, found), expected in zip(fused.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("config", TORCHS, ids=lambda config: f"{config.name}")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["as the weights", "otherwise"])
def test_a_state_that_was_saved_unfused_goes_on_fused_however_it_lies_in_memory(
    config: OptimizerConfig, layout: torch.memory_format, tmp_path
) -> None:
    whole, first, rest = Convolutions(), Convolutions(layout), Convolutions()
    whole.steps(plain(whole, config), 0, 6)
    old = plain(first, config)
    first.steps(old, 0, 3)
    state = old.state_dict()
    for group in state["param_groups"]:
        del group["fused"]  # as an older torch's
    torch.save({"model": first.state_dict(), "optimizer": state}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    rest.load_state_dict(saved["model"])
    optimizer = build_optimizer(rest, config, 0.01)
    restore(optimizer, saved["optimizer"])
    assert all(group["fused"] for group in optimizer.param_groups)
    rest.steps(optimizer, 3, 6)
    for (name, found), expected in zip(rest.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=name)
    # and the other way round: what was saved fused goes on unfused
    back = plain(Convolutions(), config)
    restore(back, optimizer.state_dict())
    assert not any(group["fused"] for group in back.param_groups)
