"""Backbones: the networks that are kept. Their output is the representation, (N, D)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.config.networks import WAVEFORM
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jem.config import BackboneConfig


class Backbone(nn.Module):
    """A network from images, float (N, 3, H, W), to the representation, (N, dim).

    That of `resnet18_1d` takes waveforms, float (N, 1, L), in place of images. A mask of patches, bool (N, patches), is
    for a `ViT`; the others refuse it.
    """

    config: BackboneConfig
    """What it was built from."""
    dim: int
    """D, width of the representation."""
    joint: bool = False
    """Whether views of one size go through together; `build_backbone` sets it where there is no batch norm."""

    def each(self, views: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """The representation, (N, dim), of each view: its images and their mask.

        If `joint`, views of one size without masks share a forward pass, whose kernels are fewer and larger. Without
        batch norm that is the same as one after the other; with batch norm they share the statistics too.
        """
        views = list(views)
        groups: dict[object, list[int]] = {}
        for place, (images, mask) in enumerate(views):
            groups.setdefault(images.shape if self.joint and mask is None else place, []).append(place)
        found: dict[int, Tensor] = {}
        for places in groups.values():
            if len(places) == 1:
                found[places[0]] = self(*views[places[0]])
            else:
                together = self(torch.cat([views[place][0] for place in places]))
                found |= zip(places, together.chunk(len(places)), strict=True)
        return [found[place] for place in range(len(views))]


class ResNet(Backbone):
    """torchvision's ResNet without its classifier; parameters have torchvision's names.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016.
    """

    def __init__(self, config: BackboneConfig) -> None:
        from torchvision import models  # and torch's compiler: 1.5 s that only a process with a ResNet pays

        super().__init__()
        network = models.get_model(config.name, weights=None, zero_init_residual=config.zero_init)
        if config.width > 1:
            widen(network, config.width, zero_init=config.zero_init)
        self.config = config
        self.dim = network.fc.in_features * config.width
        self.conv1: nn.Module = network.conv1
        self.maxpool: nn.Module = network.maxpool
        if config.stem != "imagenet":
            stride = 2 if config.stem == "stride2" else 1
            self.conv1 = nn.Conv2d(3, 64 * config.width, 3, stride=stride, padding=1, bias=False)
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
        """Images, float (N, 3, H, W), to the feature maps of the last two stages, the last one's last.

        Raises:
            InputError: in bf16 on a CPU, images so small that a stage halves a map of one pixel.
        """
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        maps = []
        for stage in (self.layer2, self.layer3, self.layer4):
            refuse_single_pixel(x)
            x = stage(x)
            maps.append(x)
        return maps[-2:]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images, float (N, 3, H, W), to the representation, (N, dim): the mean of the last feature map."""
        refuse_mask(mask)
        return torch.flatten(functional.adaptive_avg_pool2d(self.features(images), 1), 1)


def refuse_single_pixel(x: Tensor) -> None:
    """Refuse to halve a map, (N, C, h, w), of one pixel in bf16 on a CPU.

    There torch (2.15 at least) leaves the gradient of a 3 x 3 convolution's weight unset but for its centre: it is
    whatever was in memory.

    Raises:
        InputError: what helps.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[2:] == (1, 1) and torch.is_grad_enabled():
        raise InputError(
            "views are too small for this network in bf16 on a CPU (a map of one pixel is halved, whose gradient torch "
            "gets wrong): raise the views' size, set backbone.stem to stride2 or cifar, or train.precision to fp32"
        )


def refuse_mask(mask: Tensor | None) -> None:
    """Raise InputError if there is a mask: the backbone has no patches of its own that could be hidden."""
    if mask is not None:
        raise InputError(
            "masks need a ViT: a convolution mixes masked and visible pixels; leave out the views' mask, or take "
            "vit_tiny, vit_small or vit_base"
        )


def widen(network: nn.Module, factor: int, *, zero_init: bool) -> None:
    """Multiply all channels but the images' in torchvision's ResNet `network` by `factor`, drawing its weights anew."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels * (1 if layer is network.conv1 else factor)
                shape = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
                wide: nn.Module = nn.Conv2d(inputs, layer.out_channels * factor, bias=False, **shape)  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                wide = nn.BatchNorm2d(layer.num_features * factor)
            else:
                continue
            setattr(module, name, wide)
    initialise(network, zero_init=zero_init)


def initialise(network: nn.Module, *, zero_init: bool) -> None:
    """Draw a ResNet's weights as torchvision does; `zero_init`: its blocks begin as the identity."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init and isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.zeros_(last.weight)


def build_backbone(config: BackboneConfig) -> Backbone:
    """Make the backbone of `config`, its weights drawn from torch's global generator."""
    # the others are made of what is above; torchvision is imported only for what is made of it
    backbone: Backbone
    if config.is_vit:
        from jem.models.vit import ViT

        backbone = ViT(config)
    elif config.name == WAVEFORM:
        from jem.models.waveform import WaveformResNet

        backbone = WaveformResNet(config)
    elif config.is_resnet:
        backbone = ResNet(config)
    else:
        from jem.models.library import LibraryNetwork

        backbone = LibraryNetwork(config)
    backbone.joint = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())  # noqa: SLF001, the base of them all
    return backbone
