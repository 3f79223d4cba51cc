"""Draws the parameters of augmentation: one set for each image and each view.

On the CPU, from a generator of its own, so that a resumed run sees the same views, whatever the device. The
distributions are torchvision's (`RandomResizedCrop`, `ColorJitter`, `GaussianBlur`), drawn for a whole batch at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from jem.config import JitterConfig, MaskConfig, ViewConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CROP_TRIES = 10


@dataclass(frozen=True)
class ViewParams:
    """What happens to each of N images in one view. All tensors are on the CPU."""

    boxes: Tensor
    """float64 (N, 4), top, left, height, width of the crop in pixels of the original image; whole numbers."""
    flip: Tensor
    """bool (N,), mirrored left to right."""
    order: Tensor
    """int64 (N, 4), jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue), in the order of their use."""
    factors: Tensor
    """float32 (N, 4), factors of brightness, contrast, saturation, and shift of hue in turns; neutral: 1, 1, 1, 0."""
    grey: Tensor
    """bool (N,)."""
    sigma: Tensor
    """float32 (N,), standard deviation of the blur in pixels of the view; 0 for none."""
    solarize: Tensor
    """bool (N,)."""
    mask: Tensor | None = None
    """bool (N, patches), True where a patch is masked, row by row; None if the view has no masks."""

    def __len__(self) -> int:
        return self.boxes.shape[0]

    @classmethod
    def joined(cls, parts: Sequence[ViewParams]) -> ViewParams:
        """The parameters of the images of all parts, one part after the other."""
        columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        joined: dict[str, Any] = {
            name: each[0] if each[0] is None else torch.cat(each) for name, each in columns.items()
        }
        return cls(**joined)

    def rows(self, part: slice) -> ViewParams:
        """The parameters of some of the images."""
        mask = None if self.mask is None else self.mask[part]
        others = {name: value[part] for name, value in vars(self).items() if name != "mask"}
        return ViewParams(**others, mask=mask)


def generator(seed: int, epoch: int, step: int, part: int) -> Generator:
    """A generator for one part of one step's batch: the same four numbers give the same draws on any machine."""
    words = np.random.SeedSequence([abs(seed), epoch, step, part]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def draw(view: ViewConfig, size: Tensor, generator: Generator) -> ViewParams:
    """Draw the parameters of one view of N images.

    Args:
        view: the view's distributions.
        size: integer (N, 2), height and width of each original image, on the CPU.
        generator: is advanced by a number of draws that depends on N and `view` only.
    """
    count = size.shape[0]

    def happens(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    boxes = crop_boxes(size, view.scale, view.ratio, generator)
    flip = happens(view.flip)
    order, factors = jitter(view.jitter, count, generator)
    grey = happens(view.grey)
    sigma = torch.zeros(count)
    if view.blur is not None:
        low, high = view.blur.sigma
        drawn = low + (high - low) * torch.rand(count, generator=generator)
        sigma = torch.where(happens(view.blur.p), drawn, sigma)
    solarize = happens(view.solarize)
    return ViewParams(boxes, flip, order, factors, grey, sigma, solarize, draw_mask(view, count, generator))


def crop_boxes(size: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator) -> Tensor:
    """Sample crops as torchvision's `RandomResizedCrop.get_params` does.

    Area share uniform in `scale`, aspect (width / height) log-uniform in `ratio`, ten tries to fit the image, then the
    largest central crop whose aspect is in range. Returns float64 (N, 4): top, left, height, width, whole numbers.
    """
    count = size.shape[0]
    area_draw, aspect_draw = torch.rand(2, CROP_TRIES, count, generator=generator, dtype=torch.float64).numpy()
    place_draw = torch.rand(2, count, generator=generator, dtype=torch.float64).numpy()

    # NumPy: an operation on arrays as small as these takes less time than one of torch
    height, width = size.to(torch.float64).numpy().T
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * aspect_draw)
    tried_w, tried_h = np.sqrt(area * aspect).round(), np.sqrt(area / aspect).round()
    fits = (tried_w > 0) & (tried_w <= width) & (tried_h > 0) & (tried_h <= height)
    first = fits.argmax(axis=0), np.arange(count)  # the first try where none fits
    crop_w, crop_h = tried_w[first], tried_h[first]
    top = np.floor(place_draw[0] * (height - crop_h + 1))
    left = np.floor(place_draw[1] * (width - crop_w + 1))

    # torchvision's fallback; a crop never becomes empty here, though one of a 1 x 1000 image would there
    central_w = np.where(width > height * max(ratio), (height * max(ratio)).round(), width).clip(min=1)
    central_h = np.where(width < height * min(ratio), (width / min(ratio)).round(), height).clip(min=1)
    central = [np.floor((height - central_h) / 2), np.floor((width - central_w) / 2), central_h, central_w]
    boxes = np.where(fits[first], np.stack([top, left, crop_h, crop_w]), np.stack(central))
    return torch.from_numpy(np.ascontiguousarray(boxes.T))


def jitter(config: JitterConfig | None, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Order int64 (N, 4) and factors float32 (N, 4) of colour jitter, as torchvision's `ColorJitter` draws them.

    Brightness, contrast and saturation are uniform in [max(0, 1 - x), 1 + x], hue in [-x, x] turns; each image has its
    own order. With probability 1 - p an image's factors are those that change nothing.
    """
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    if config is None:
        return torch.arange(4).expand(count, 4), neutral.expand(count, 4)
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)
    spread = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    low, high = neutral - spread, neutral + spread
    low[:HUE].clamp_(min=0)
    factors = low + (high - low) * torch.rand(count, 4, generator=generator)
    happens = torch.rand(count, 1, generator=generator) < config.p
    return order, torch.where(happens, factors, neutral)


def draw_mask(view: ViewConfig, count: int, generator: Generator) -> Tensor | None:
    """Masks bool (N, patches) of `view.mask`, each hiding the same number of patches; None, and no draw, without."""
    if view.mask is None:
        return None
    hidden, side = view.mask.hidden(view.size), view.size // view.mask.patch
    if view.mask.kind == "random":
        return torch.rand(count, side * side, generator=generator).argsort(dim=1) < hidden
    return mask_blocks(view.mask, side, hidden, count, generator)


def mask_blocks(mask: MaskConfig, side: int, hidden: int, count: int, generator: Generator) -> Tensor:
    """Masks made of rectangles, bool (N, side * side), each hiding exactly `hidden` patches.

    As BEiT's blockwise masking: rectangle after rectangle, its area uniform from `mask.block` to what is still to be
    hidden, its aspect log-uniform in `mask.aspect`, anywhere in the image. BEiT stops where no further rectangle fits,
    and hides fewer then; here the last one is cut off, row by row, at the stated number.
    """
    # rectangles are drawn until the last image has enough: from a generator of their own, so that the caller's is
    # advanced by one draw
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    low, high = (math.log(bound) for bound in mask.aspect)
    masked = torch.zeros(count, side * side, dtype=torch.bool)
    while (left := hidden - masked.sum(dim=1, keepdim=True)).any():
        area_draw, aspect_draw, top_draw, left_draw = torch.rand(4, count, 1, generator=own)
        least = left.clamp(max=mask.block)
        area = least + (left - least) * area_draw
        aspect = torch.exp(low + (high - low) * aspect_draw)
        tall = (area * aspect).sqrt().round().clamp(1, side)
        wide = (area / aspect).sqrt().round().clamp(1, side)
        rows = _between((top_draw * (side - tall + 1)).floor(), tall, side)
        columns = _between((left_draw * (side - wide + 1)).floor(), wide, side)
        new = (rows[:, :, None] & columns[:, None, :]).flatten(1) & ~masked
        masked |= new & (new.cumsum(dim=1) <= left)
    return masked


def _between(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Which of `side` places are in `start` ... `start + length - 1`; (N, 1) each, to bool (N, side)."""
    place = torch.arange(side)
    return (place >= start) & (place < start + length)
