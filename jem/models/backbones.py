"""Backbones: the networks that are kept. Their output is the representation, (N, D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18, resnet34, resnet50

from jem.errors import InputError

if TYPE_CHECKING:
    from jem.config import BackboneConfig

_BUILDERS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}


class Backbone(nn.Module):
    """A network from images, float (N, 3, H, W), to the representation, (N, dim)."""

    config: BackboneConfig
    """What it was built from."""
    dim: int
    """D, width of the representation."""


class ResNet(Backbone):
    """torchvision's ResNet without its classifier; parameters have torchvision's names.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        network = _BUILDERS[config.name](weights=None, zero_init_residual=config.zero_init)
        self.config = config
        self.dim = network.fc.in_features
        self.conv1: nn.Module = network.conv1
        self.maxpool: nn.Module = network.maxpool
        if config.stem != "imagenet":
            self.conv1 = nn.Conv2d(3, 64, 3, stride=2 if config.stem == "stride2" else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
            self.maxpool = nn.Identity()
        self.bn1 = network.bn1
        self.relu = network.relu
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def features(self, images: Tensor) -> Tensor:
        """Images, float (N, 3, H, W), to the last feature map, (N, dim, h, w); h is H / 32 with the ImageNet stem."""
        return self.stages(images)[-1]

    def stages(self, images: Tensor) -> list[Tensor]:
        """Images, float (N, 3, H, W), to the feature maps of the last two stages, the last one's last."""
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images))))))
        third = self.layer3(x)
        return [third, self.layer4(third)]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images, float (N, 3, H, W), to the representation, (N, dim): the mean of the last feature map."""
        if mask is not None:
            raise InputError("masks need a ViT: a convolution mixes masked and visible pixels; leave out views' mask")
        return torch.flatten(functional.adaptive_avg_pool2d(self.features(images), 1), 1)


def build_backbone(config: BackboneConfig) -> Backbone:
    """Make the backbone of `config`, its weights drawn from torch's global generator."""
    if config.is_vit:
        from jem.models.vit import ViT  # which is a Backbone

        return ViT(config)
    return ResNet(config)
