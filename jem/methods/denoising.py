"""Denoising autoencoder: reconstruct an image from a noisy version of it.

Vincent, Larochelle, Bengio, Manzagol, "Extracting and Composing Robust Features with Denoising Autoencoders", 2008.

    loss = mean over images, channels and pixels of (decoder(backbone(noisy x)) - x)²

Noise is the paper's masking noise (whole pixels become 0, the mean colour), Gaussian noise that is added before it, or
both. The paper's layers are fully connected and trained one after the other; here the network is the backbone, and a
decoder of convolutions goes from the representation back to the pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from jem.device import put
from jem.distributed import all_reduce_mean, world
from jem.methods.base import Method, StepOutput, at_least_float32, mine
from jem.models.backbones import Backbone, build_backbone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jem.batch import Views
    from jem.config import BackboneConfig, DenoisingConfig

GRID = 4
"""Side of the decoder's first feature map."""


def add_noise(images: Tensor, sigma: float, mask: float, generator: Generator) -> Tensor:
    """This worker's images, (n, 3, H, W), with noise that is drawn for the global batch; same shape and type.

    Args:
        images: normalised.
        sigma: standard deviation of the Gaussian noise, drawn for each pixel and channel.
        mask: probability that a pixel becomes 0, in all its channels.
        generator: on the CPU, the same on every worker.
    """
    shape = (world() * len(images), *images.shape[1:])
    if sigma:
        images = images + sigma * put(mine(torch.randn(shape, generator=generator)), images.device).to(images.dtype)
    if mask:
        visible = torch.rand(shape[0], 1, *shape[2:], generator=generator) >= mask
        images = images * put(mine(visible), images.device)
    return images


class Decoder(nn.Module):
    """From a representation, (N, dim), to images, (N, 3, H, W), of any size of 4 pixels or more.

    A linear layer makes a map of 4 x 4, and each stage enlarges it by the same factor (to the nearest pixel), followed
    by a 3 x 3 convolution, batch norm and ReLU; a last convolution makes the colours.

    Args:
        dim: of the representation.
        channels: of the 4 x 4 map and of the stages; the last map, of full size, has the last one's.
    """

    def __init__(self, dim: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels[0]
        self.linear = nn.Linear(dim, channels[0] * GRID * GRID)
        widths = (channels[0], *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in pairwise(widths)
        )
        self.colours = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, representation: Tensor, height: int, width: int) -> Tensor:
        """Images of `height` x `width` pixels."""
        x = self.linear(representation).view(-1, self.channels, GRID, GRID)
        for number, stage in enumerate(self.stages, start=1):
            part = number / len(self.stages)
            size = [round(GRID * (side / GRID) ** part) for side in (height, width)]
            x = stage(functional.interpolate(x, size=size, mode="nearest"))
        return cast("Tensor", self.colours(x))


class Denoising(Method):
    """Backbone and decoder."""

    config: DenoisingConfig

    def __init__(self, config: DenoisingConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.network = build_backbone(backbone)
        self.decoder = Decoder(self.network.dim, config.decoder)

    @property
    def backbone(self) -> Backbone:
        """The encoder."""
        return self.network

    def forward(self, views: Views) -> StepOutput:
        """Squared error of the view; the embedding is the representation, of the noisy view."""
        ((images, mask),) = views
        noisy = add_noise(images, self.config.sigma, self.config.mask, self.generator)
        representation = self.network(noisy, mask)
        decoded = self.decoder(representation, *images.shape[2:])
        with torch.autocast(images.device.type, enabled=False):
            # the workers' parts are equally large, so that the mean of their means is that of the global batch
            loss = all_reduce_mean(functional.mse_loss(at_least_float32(decoded), at_least_float32(images)))
        return self.output(loss, (representation,), representation, {"reconstruction": loss})
