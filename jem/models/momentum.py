"""Momentum networks: copies that follow the online network as an exponential moving average (EMA) of its weights."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from jem.models.vit import Block

if TYPE_CHECKING:
    from jem.config import MomentumConfig

Network = TypeVar("Network", bound=nn.Module)


def momentum_copy(online: Network) -> Network:
    """A copy of `online` with the same weights, which no optimizer moves; it leaves no block out (drop_path 0)."""
    target = copy.deepcopy(online)
    for module in target.modules():
        if isinstance(module, Block):
            module.drop_path = 0.0
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    return target


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Let each parameter of `target` become tau target + (1 - tau) online; buffers stay.

    Batch norms' running statistics are the target's own: it sees the views itself.
    """
    targets: list[Tensor] = list(target.parameters())
    onlines: list[Tensor] = list(online.parameters())
    torch._foreach_lerp_(targets, onlines, 1 - tau)


def decay(config: MomentumConfig, share: float) -> float:
    """Tau at a `share` of the training, from 0 to 1.

    cosine: final - (final - tau) (1 + cos(pi share)) / 2, as BYOL's; linear as data2vec's.
    """
    if config.schedule == "constant":
        return config.tau
    done = min(1.0, share / config.over) if config.over else 1.0
    if config.schedule == "linear":
        return config.tau + (config.final - config.tau) * done
    return config.final - (config.final - config.tau) * (1 + math.cos(math.pi * done)) / 2
