"""From a batch of decoded images to normalised views, on the batch's device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jem.augment import ops
from jem.augment.params import HUE, ViewParams, draw, generator
from jem.batch import Batch, Views

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Generator, Tensor

    from jem.config import AugmentConfig, ViewConfig

__all__ = ["Augment", "centre_view", "generator", "prefetched"]

SOLARIZE_ABOVE = 0.5


class Augment:
    """Makes the views of a batch as `config` describes them. Holds no state but the configuration."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.views: list[ViewConfig] = [view for view in config.views for _ in range(view.count)]

    def __call__(self, batch: Batch, generator: Generator, dtype: torch.dtype = torch.float32) -> Views:
        """Draw the parameters and make the views on the device of `batch.image`.

        `batch.size` should be on the CPU, where the parameters are drawn; elsewhere it is fetched, which waits.
        """
        return Views(self.apply(batch, self.draw(batch.size, generator), dtype), batch.id, batch.label)

    def draw(self, size: Tensor, generator: Generator) -> list[ViewParams]:
        """The parameters of each view, for images whose original height and width are `size` (N, 2)."""
        size = size.cpu()
        return [draw(view, size, generator) for view in self.views]

    def apply(self, batch: Batch, params: list[ViewParams], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Make one view for each of `params`: `dtype` (N, 3, s, s), normalised, channels_last."""
        size = batch.size.cpu()
        return [
            ops.normalize(self._make(batch.image, size, view, drawn), self.config.mean, self.config.std, dtype)
            for view, drawn in zip(self.views, params, strict=True)
        ]

    def _make(self, image: Tensor, size: Tensor, view: ViewConfig, drawn: ViewParams) -> Tensor:
        device = image.device
        boxes = on_canvas(drawn.boxes, size, image.shape[2], image.shape[3])
        out = ops.resized_crop(image, put(boxes, device), view.size, put(drawn.flip, device))
        if view.jitter is not None:
            weights = put(ops.jitter_weights(drawn.order, drawn.factors), device)
            for step in range(4):
                out = ops.blend(out, *weights[step].unbind())
                index = ((drawn.order[:, step] == HUE) & (drawn.factors[:, HUE] != 0)).nonzero()[:, 0]
                shift = put(drawn.factors[index, HUE], device)
                replace(out, put(index, device), lambda x, shift=shift: ops.adjust_hue(x, shift))
        replace(out, put(drawn.grey.nonzero()[:, 0], device), ops.greyscale)
        if view.blur is not None:
            kernel, index = view.blur.kernel, drawn.sigma.nonzero()[:, 0]
            sigma = put(drawn.sigma[index], device)
            replace(out, put(index, device), lambda x: ops.gaussian_blur(x, sigma, kernel))
        replace(out, put(drawn.solarize.nonzero()[:, 0], device), lambda x: ops.solarize(x, SOLARIZE_ABOVE))
        return out


def replace(images: Tensor, index: Tensor, operation) -> None:
    if index.numel():
        images.index_copy_(0, index, operation(images.index_select(0, index)))


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_canvas(boxes: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) in pixels of originals of `size` (N, 2), in pixels of the height x width canvas of each."""
    scale = torch.tensor([height, width], dtype=torch.float64, device=boxes.device) / size
    return boxes * scale.repeat(1, 2)


def centre_view(images: Tensor, sizes: Tensor | None, out_size: int) -> Tensor:
    """The view used for evaluation: the central square of each original, resized with antialiasing.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W): whole images, squashed to one shape.
        sizes: integer (N, 2), height and width before they were squashed; None if they were not.
        out_size: side of the result in pixels.

    Returns:
        float32 (N, 3, out_size, out_size) in [0, 1], not normalised.
    """
    count, _, height, width = images.shape
    if sizes is None:
        sizes = torch.tensor([[height, width]], device=images.device).expand(count, 2)
    sizes = sizes.to(images.device)
    side = sizes.amin(dim=1, keepdim=True).to(torch.float64)
    boxes = torch.cat([(sizes - side) / 2, side, side], dim=1)
    return ops.resized_crop(images, on_canvas(boxes, sizes, height, width), out_size)


def prefetched(
    batches: Iterable[Batch],
    generators: Iterable[Generator],
    augment: Augment,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Batch, Views]]:
    """Views of each batch with its own generator, on `device`; yields the batch as it came, beside its views."""
    for batch, random in zip(batches, generators, strict=False):
        moved = Batch(batch.image.to(device), batch.size, batch.id.to(device), batch.label.to(device))
        yield batch, augment(moved, random, dtype)
