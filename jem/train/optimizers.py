"""Optimizers and their parameter groups."""

# ruff: noqa: SLF001 - torch's multi-tensor operations have private names only, the same since 1.7

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from jem.config import AdamConfig, AdamWConfig, LARSConfig, SGDConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jem.config import OptimizerConfig
    from jem.methods.base import Method

FUSED = ("cpu", "cuda")
"""Devices on which torch's optimizers have one kernel for the whole step."""


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, in the dialect of the VICReg and Barlow Twins papers' code.

    You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017. For a weight w with gradient g:

        u = g + weight_decay w
        u = u * eta |w| / |u|       where both norms are positive; the factor, q, is min(q / lr, 1) with `clip`
        m = momentum m + u
        w = w - lr m

    In groups with `adapt=False` (biases and norms) the second line is left out.

    Args:
        params: parameters or groups; a group may have its own `lr`, `weight_decay` and `adapt`.
        lr: global learning rate.
        weight_decay: of all parameters in groups that do not say otherwise.
        momentum: of the update.
        eta: trust coefficient.
        clip: limit the local rate, lr * q, to lr (in these terms: the rate of an adapted weight is at most `lr`).
        adapt: whether the update is scaled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eta": eta,
            "clip": clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._move([weight for weight in group["params"] if weight.grad is not None], group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """One step of a group, by the multi-tensor operations that torch's own optimizers are made of."""
        if not weights:
            return
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        updates = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            weight_norms = torch.stack(torch._foreach_norm(weights))
            update_norms = torch.stack(torch._foreach_norm(updates))
            trust = group["eta"] * weight_norms / update_norms
            if group["clip"]:
                trust = (trust / group["lr"]).clamp(max=1.0)
            trust = torch.where((weight_norms > 0) & (update_norms > 0), trust, 1.0)
            torch._foreach_mul_(updates, list(trust.unbind()))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def parameter_groups(method: Method, weight_decay: float, bias_scale: float = 1.0) -> list[dict[str, Any]]:
    """Groups: weights of more than one dimension, and the rest (biases, norms), neither decayed nor LARS-scaled.

    Each says by `decay` whether a weight decay applies to it, by `scheduled` whether its rate follows the schedule
    (`Method.constant_rate` names those that do not), and by `scale` what its rate is multiplied by.
    """
    constant = {id(parameter) for module in method.constant_rate() for parameter in module.parameters()}
    groups: list[dict[str, Any]] = []
    for scheduled in (True, False):
        parameters = [p for p in method.parameters() if p.requires_grad and (id(p) not in constant) == scheduled]
        groups += [
            {
                "params": [p for p in parameters if (p.dim() > 1) == decay],
                "weight_decay": weight_decay if decay else 0.0,
                "decay": decay,
                "adapt": decay,
                "scheduled": scheduled,
                "scale": 1.0 if decay else bias_scale,
            }
            for decay in (True, False)
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(method: Method, config: OptimizerConfig, lr: float) -> Optimizer:
    """Make the optimizer of `config` for the parameters of `method`, with `lr` in place of the unscaled `config.lr`."""
    bias_scale = 1.0
    if isinstance(config, LARSConfig) and config.bias_lr is not None:
        bias_scale = config.bias_lr / config.lr
    groups = parameter_groups(method, config.weight_decay, bias_scale)
    fused = all(weight.device.type in FUSED for group in groups for weight in group["params"])
    match config:
        case LARSConfig():
            optimizer: Optimizer = LARS(groups, lr, momentum=config.momentum, eta=config.eta, clip=config.clip)
        case SGDConfig():
            optimizer = SGD(groups, lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
            if config.momentum:
                optimizer.register_step_pre_hook(_begin_momenta)
        case AdamConfig():
            optimizer = Adam(groups, lr, betas=config.betas, fused=fused)
        case AdamWConfig():
            optimizer = AdamW(groups, lr, betas=config.betas, fused=fused)
    set_rates(optimizer, lr, lr, config.weight_decay)
    return optimizer


def _begin_momenta(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give a momentum of 0 to each weight that moves for the first time, which is how SGD begins.

    Fused, it can begin with all weights of a group at once only, and some methods let a part stand still at first.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state dictionary of an optimizer of the same kind, fused or not, on whatever device.

    What it remembers of a weight is laid out in memory as the weight is: fused operations take the layouts for equal
    (on a CPU without looking, torch 2.15).
    """
    groups = [
        kept | ({"fused": group["fused"]} if "fused" in group else {})
        for group, kept in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for weight, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                slots[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def set_rates(optimizer: Optimizer, lr: float, peak: float, weight_decay: float) -> None:
    """Give the rates of a step to the groups of `build_optimizer`.

    Args:
        optimizer: of `build_optimizer`.
        lr: the schedule's rate; times the group's `scale`.
        peak: the schedule's highest rate, for the groups that do not follow it.
        weight_decay: for those that are decayed.
    """
    for group in optimizer.param_groups:
        group["lr"] = (lr if group["scheduled"] else peak) * group["scale"]
        if group["decay"]:
            group["weight_decay"] = weight_decay
