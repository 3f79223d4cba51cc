"""Optimizers and their parameter groups."""

# ruff: noqa: SLF001 - torch's multi-tensor operations have private names only, the same since 1.7

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from jem.config import AdamWConfig, LARSConfig, SGDConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jem.config import OptimizerConfig


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of more than one dimension, and the rest (biases, norms), neither decayed nor LARS-scaled.

    Each says by `decay` whether a weight decay applies to it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    rest = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "decay": True, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "decay": False, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> Optimizer:
    """Make the optimizer of `config` for the parameters of `model`, with `lr` in place of the unscaled `config.lr`."""
    groups = parameter_groups(model, config.weight_decay)
    match config:
        case LARSConfig():
            return LARS(groups, lr, momentum=config.momentum, eta=config.eta, clip=config.clip)
        case SGDConfig():
            return SGD(groups, lr, momentum=config.momentum, nesterov=config.nesterov)
        case AdamWConfig():
            return AdamW(groups, lr, betas=config.betas)


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Give the learning rate to all groups of `build_optimizer`, and the weight decay to those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay
