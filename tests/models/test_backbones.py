"""Backbones are torchvision's networks without the classifier."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from jem.config import BackboneConfig
from jem.errors import InputError
from jem.models.backbones import build_backbone


def make(**settings: object):
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(**settings))


WIDTHS = {"resnet18": 512, "resnet34": 512} | dict.fromkeys(("resnet50", "resnet101", "wide_resnet50_2"), 2048)


@pytest.mark.parametrize("name", WIDTHS)
def test_with_the_imagenet_stem_it_is_torchvisions(name: str) -> None:
    backbone = make(name=name).eval()
    reference = getattr(torchvision.models, name)(weights=None).eval()
    missing = reference.load_state_dict(backbone.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), reference(images), rtol=1e-5, atol=1e-6)
    assert backbone(images).shape == (2, backbone.dim)
    assert backbone.dim == WIDTHS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_width_multiplies_all_channels_but_the_images(name: str, stem: str) -> None:
    with torch.device("meta"):
        plain, wide = make(name=name, stem=stem), make(name=name, stem=stem, width=2)
    assert wide.dim == 2 * plain.dim
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    for key, value in wide.state_dict().items():
        doubled = [2 * side for side in shapes[key][:2]] + list(shapes[key][2:])
        if key == "conv1.weight":
            doubled[1] = 3
        assert list(value.shape) == doubled, key
    assert wide(torch.randn(2, 3, 32, 32, device="meta")).shape == (2, 2 * plain.dim)


@pytest.mark.parametrize("zero_init", [True, False])
def test_a_wide_network_is_drawn_as_torchvisions(zero_init: bool) -> None:
    wide = make(name="resnet50", width=2, zero_init=zero_init)
    conv = wide.layer2[0].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (conv.shape[0] * 9)) ** 0.5, rel=0.05)
    assert {block.bn3.weight.abs().sum().item() == 0 for block in wide.layer1} == {zero_init}


def test_a_mask_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="masks need a ViT: a convolution mixes"):
        make()(torch.randn(2, 3, 32, 32), torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("stride2", 2), ("cifar", 4)])
def test_stem_says_how_fine_the_last_feature_map_is(stem: str, side: int) -> None:
    backbone = make(stem=stem).eval()
    images = torch.randn(2, 3, 32, 32)
    features = backbone.features(images)
    assert features.shape == (2, 512, side, side)
    torch.testing.assert_close(backbone(images), features.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 256), ("resnet50", 1024)])
def test_the_maps_of_the_last_two_stages_are_at_hand(name: str, width: int) -> None:
    backbone = make(name=name, stem="stride2").eval()
    images = torch.randn(2, 3, 32, 32)
    third, last = backbone.stages(images)
    assert (third.shape, last.shape) == ((2, width, 4, 4), (2, 2 * width, 2, 2))
    assert torch.equal(last, backbone.layer4(third))
    assert torch.equal(last, backbone.features(images))


@pytest.mark.parametrize(("stem", "stride"), [("stride2", 2), ("cifar", 1)])
def test_small_stems_are_one_convolution_of_three_drawn_as_torchvisions(stem: str, stride: int) -> None:
    conv = make(stem=stem).conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (stride, stride), (1, 1), None)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_last_norm_of_every_block_begins_at_zero_if_asked(name: str, zero_init: bool) -> None:
    backbone = make(name=name, zero_init=zero_init)
    last = "bn2" if name == "resnet18" else "bn3"
    blocks = [block for i in range(1, 5) for block in getattr(backbone, f"layer{i}")]
    assert {getattr(block, last).weight.abs().sum().item() == 0 for block in blocks} == {zero_init}


def test_it_remembers_its_configuration_and_the_seed_decides_its_weights() -> None:
    config = BackboneConfig(stem="cifar")
    first, second = make(stem="cifar"), make(stem="cifar")
    assert first.config == config
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_it_exports_with_a_dynamic_batch() -> None:
    backbone = make(stem="stride2").eval()
    program = torch.export.export(backbone, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("n")},))
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), backbone(images), rtol=1e-4, atol=1e-5)


def test_halving_a_single_pixel_in_bf16_on_a_cpu_is_refused_because_torch_gets_its_gradient_wrong() -> None:
    backbone = make()
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(2, 3, 32, 32)).sum().backward()
        with pytest.raises(InputError, match="views are too small for this network in bf16 on a CPU"):
            backbone(torch.randn(2, 3, 16, 16))
        with torch.no_grad():
            assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 512)
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 512)
