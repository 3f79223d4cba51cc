"""Heads are blocks of linear layer, batch norm and ReLU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jem.models.heads import mlp


def test_blocks_and_the_last_layer_are_as_stated() -> None:
    head = mlp((4, 8, 6, 2))
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(4, 8), (8, 6), (6, 2)]
    assert [layer.bias is not None for layer in linear] == [False, False, True]
    assert head(torch.randn(5, 4)).shape == (5, 2)


def test_last_layer_may_go_without_bias_or_with_a_plain_norm() -> None:
    assert mlp((4, 2), last_bias=False)[0].bias is None
    linear, norm = mlp((4, 2), last_norm=True)
    assert linear.bias is None
    assert (norm.num_features, norm.affine) == (2, False)


@pytest.mark.parametrize("widths", [(), (4,)])
def test_an_output_width_is_needed(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input and an output width"):
        mlp(widths)
