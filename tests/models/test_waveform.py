"""A ResNet-18 of one dimension, for waveforms."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18

from jem.config import BackboneConfig
from jem.errors import InputError
from jem.models.backbones import build_backbone


def make(**settings: object):
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name="resnet18_1d", **settings))


def test_it_is_torchvisions_resnet18_with_kernels_of_one_row() -> None:
    """torchvision's network computes the same of an image of one row, if only its kernels' middle rows count."""
    ours = make(zero_init=False).eval()
    reference = resnet18(weights=None).eval()
    reference.fc = torch.nn.Identity()
    weights = {}
    for name, value in ours.state_dict().items():
        theirs = name.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
        weights[theirs] = value
        if value.dim() == 3:
            channels, inputs, taps = value.shape
            weights[theirs] = torch.zeros(channels, inputs, taps, taps)
            weights[theirs][:, :, taps // 2] = value
    weights["conv1.weight"] = weights["conv1.weight"].expand(-1, 3, -1, -1) / 3  # of three channels alike
    reference.load_state_dict(weights)
    waveforms = torch.randn(2, 1, 1000)
    image = waveforms[:, :, None].expand(2, 3, 1, 1000)
    assert ours.dim == 512
    torch.testing.assert_close(ours(waveforms), reference(image), rtol=1e-4, atol=1e-5)


def test_width_and_zero_init_are_those_of_the_other_resnets() -> None:
    wide = make(width=2)
    assert wide.dim == 1024
    assert wide(torch.randn(3, 1, 256)).shape == (3, 1024)
    assert {block.bn2.weight.abs().sum().item() for block in wide.layer3} == {0.0}
    assert make(zero_init=False).layer3[0].bn2.weight.mean() == 1


def test_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes waveforms, \(N, 1, L\), not a tensor of \(2, 3, 32, 32\)"):
        make()(torch.randn(2, 3, 32, 32))
    with pytest.raises(InputError, match="masks need a ViT"):
        make()(torch.randn(2, 1, 64), torch.zeros(2, 4, dtype=torch.bool))
