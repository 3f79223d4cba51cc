"""A backbone for raw audio: a ResNet-18 of one dimension, as VICReg's audio experiment has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torchvision.models import resnet18

from jem.errors import InputError
from jem.models.backbones import Backbone, initialise, refuse_mask, widen

if TYPE_CHECKING:
    from jem.config import BackboneConfig


class WaveformResNet(Backbone):
    """torchvision's ResNet-18 with every layer's counterpart in one dimension, and one input channel.

    Waveforms, float (N, 1, L), to the representation, (N, dim): the mean of the last feature map, of length L / 32.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        network = resnet18(weights=None)
        if config.width > 1:
            widen(network, config.width, zero_init=config.zero_init)
        self.config = config
        self.dim = network.fc.in_features * config.width
        network.conv1 = nn.Conv2d(1, 64 * config.width, 7, stride=2, padding=3, bias=False)
        flatten(network)
        initialise(network, zero_init=config.zero_init)
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def forward(self, waveforms: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waveforms, float (N, 1, L), to the representation, (N, dim).

        Raises:
            InputError: the input is no waveform, or comes with a mask.
        """
        refuse_mask(mask)
        if waveforms.dim() != 3 or waveforms.shape[1] != 1:
            raise InputError(f"resnet18_1d takes waveforms, (N, 1, L), not a tensor of {tuple(waveforms.shape)}")
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(waveforms)))))
        return cast("Tensor", features.mean(dim=2))


def flatten(network: nn.Module) -> None:
    """Replace convolutions, batch norms and max-pools of two dimensions by those of one; weights are drawn anew."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                shape = {each: getattr(layer, each)[0] for each in ("kernel_size", "stride", "padding")}
                flat: nn.Module = nn.Conv1d(layer.in_channels, layer.out_channels, bias=False, **shape)
            elif isinstance(layer, nn.BatchNorm2d):
                flat = nn.BatchNorm1d(layer.num_features)
            elif isinstance(layer, nn.MaxPool2d):
                pool: dict[str, Any] = {each: getattr(layer, each) for each in ("kernel_size", "stride", "padding")}
                flat = nn.MaxPool1d(**pool)
            else:
                continue
            setattr(module, name, flat)
