"""Heads: the multi-layer perceptrons that a method puts on the backbone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence


def mlp(
    widths: Sequence[int], *, last_bias: bool = True, last_norm: bool = False, norm: bool = True, gelu: bool = False
) -> nn.Sequential:
    """Blocks of linear layer, batch norm and ReLU, then a last linear layer.

    Linear layers before a batch norm have no bias: the norm's mean would take it out again.

    Args:
        widths: input width, hidden widths, output width; `(512, 64)` is one linear layer.
        last_bias: whether the last linear layer has a bias (it never has one if `last_norm`).
        last_norm: whether a batch norm without affine parameters follows the last layer.
        norm: whether the hidden layers have batch norm.
        gelu: whether GELU takes the place of ReLU.

    Returns:
        A module from (N, widths[0]) to (N, widths[-1]).
    """
    if len(widths) < 2:
        raise ValueError(f"an MLP needs an input and an output width, not {tuple(widths)}")
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(width_in, width_out, bias=not norm))
        layers += [nn.BatchNorm1d(width_out)] if norm else []
        layers.append(nn.GELU() if gelu else nn.ReLU(inplace=True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias and not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
