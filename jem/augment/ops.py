"""Batched augmentation: each image of a batch has its own parameters.

Images are float32 (N, 3, H, W) with values in [0, 1]. Given the same parameters, each operation equals torchvision's
functional one on that image. Nothing here waits for the device: shapes depend on arguments that are on the CPU.

Selections are arithmetic (sign, floor, lerp) rather than comparisons and `torch.where`: on a CPU, comparing or
selecting by a boolean tensor takes 0.7-1.7 ns per element, arithmetic 0.1-0.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from jem.augment.params import CONTRAST, HUE, SATURATION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # of red, green, blue; torchvision's (ITU-R BT.601)


# --- geometry -----------------------------------------------------------------------------------------------------


def resized_crop(
    images: Tensor, boxes: Tensor, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Tensor:
    """Crop each image to its own box and resize the crop to a square, bilinearly.

    Two batched matrix products, `rows @ image @ columns.T`, whose weights are those of `interpolate(mode="bilinear",
    align_corners=False, antialias=antialias)` on the crop. A box may end inside a pixel, which then counts by the
    part of it that is inside.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W).
        boxes: float (N, 4), top, left, height, width in pixels of `images`, inside it; on the device of `images`.
        out_size: side of the result in pixels.
        flip: bool (N,), mirrored left to right; on the device of `images`.
        antialias: widen the triangle filter where the crop shrinks.

    Returns:
        float32 (N, 3, out_size, out_size), in [0, 1], contiguous.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.unbind(1)
    rows = resize_weights(top, box_height, height, out_size, antialias=antialias)
    columns = resize_weights(left, box_width, width, out_size, flip, antialias=antialias)
    if images.dtype == torch.uint8:
        rows = rows / 255
    return separable(images.to(torch.float32), rows, columns)


def resize_weights(
    start: Tensor, length: Tensor, pixels: int, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Tensor:
    """Weights float32 (N, out_size, pixels) that resize `pixels[start : start + length]` to `out_size`, along one axis.

    Rows sum to 1. `start`, `length`: float (N,), in pixels; `flip`: bool (N,), last output first.
    """
    start, length = start.to(torch.float64)[:, None], length.to(torch.float64)[:, None]
    outputs = torch.arange(out_size, device=start.device) + 0.5
    step = length / out_size
    position = outputs if flip is None else torch.where(flip[:, None], out_size - outputs, outputs)
    center = (start + step * position).to(torch.float32)
    slope = (1 / step.clamp(min=1) if antialias else torch.ones_like(step)).to(torch.float32)

    left = torch.arange(pixels, device=start.device, dtype=torch.float32)
    inside = torch.minimum(left + 1, start + length) - torch.maximum(left, start)
    weights = (left + 0.5 - center[:, :, None]).abs_().mul_(-slope[:, :, None]).add_(1).clamp_(min=0)
    weights = weights.mul_(inside.clamp_(0, 1).to(torch.float32)[:, None])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur each image with its own Gaussian, edges reflected, as two batched matrix products.

    `sigma`: float (N,), > 0, pixels; `kernel`: odd size in pixels, at most 2 * min(H, W) - 1.
    """
    height, width = images.shape[2:]
    rows = blur_weights(sigma, kernel, height)
    return separable(images, rows, rows if height == width else blur_weights(sigma, kernel, width))


def blur_weights(sigma: Tensor, kernel: int, pixels: int) -> Tensor:
    """Weights float32 (N, pixels, pixels) of a Gaussian blur along one axis, with reflection at both ends."""
    half, last = kernel // 2, pixels - 1
    offsets = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float32)
    taps = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)
    taps = torch.nn.functional.pad(taps, (0, 1))  # the last, 0, stands for everything out of reach
    here = torch.arange(pixels, device=sigma.device)
    weights = taps.new_zeros(sigma.shape[0], pixels * pixels)
    for source, exists in ((here, here >= 0), (-here, here > 0), (2 * last - here, here < last)):
        tap = source - here[:, None] + half
        tap = torch.where(exists & (tap >= 0) & (tap < kernel), tap, kernel)
        weights += taps.index_select(1, tap.flatten())
    return weights.view(-1, pixels, pixels)


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ channel @ columns.T` for each channel; `rows` (N, h, H), `columns` (N, w, W); in float32 always."""
    count, channels, height, width = images.shape
    with _no_autocast(images.device.type):
        narrow = torch.bmm(images.reshape(count, channels * height, width), columns.transpose(1, 2))
        return torch.matmul(rows[:, None], narrow.view(count, channels, height, -1))


def _no_autocast(device: str) -> AbstractContextManager[None]:
    """Entered only where autocast is on: the context would stay in an exported program."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


# --- colour -------------------------------------------------------------------------------------------------------


def grey(images: Tensor) -> Tensor:
    """Luma (N, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def greyscale(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    return grey(images)[:, None].expand_as(images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`factor * image`, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the image's luma, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return blend(images, factor, torch.zeros_like(factor), 1 - factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return blend(images, factor, 1 - factor, torch.zeros_like(factor))


def blend(images: Tensor, image_weight: Tensor, luma_weight: Tensor, mean_weight: Tensor) -> Tensor:
    """`image_weight * image + luma_weight * luma + mean_weight * mean(luma)`, clamped to [0, 1]; weights (N,)."""
    luma = grey(images)
    mean = luma.mean(dim=(1, 2)) * mean_weight
    base = luma.mul_(luma_weight[:, None, None]).add_(mean[:, None, None])
    return torch.addcmul(base[:, None], images, image_weight[:, None, None, None]).clamp_(0, 1)


def blend_weights(order: Tensor, factors: Tensor) -> Tensor:
    """Colour jitter as weights of `blend`: float32 (4 steps, 3 weights, N).

    Brightness, contrast and saturation differ only in these weights, so that one `blend` of the whole batch does a
    step, whatever each image's operation is. An image whose step is hue gets weights that leave it as it is.

    Args:
        order: int64 (N, 4), operation (0 brightness, 1 contrast, 2 saturation, 3 hue) of each step.
        factors: float32 (N, 4), factor of each operation.
    """
    factor = factors.gather(1, order)
    factor = torch.where(order == HUE, 1.0, factor)
    luma = torch.where(order == SATURATION, 1 - factor, 0.0)
    mean = torch.where(order == CONTRAST, 1 - factor, 0.0)
    return torch.stack([factor, luma, mean]).permute(2, 0, 1).contiguous()


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by `shift`, float (N,), in turns (-0.5..0.5); value and saturation stay."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = torch.minimum(torch.minimum(red, green), blue).neg_().add_(value)
    # hue in sixths of a turn, times chroma, by which channel is the largest; without chroma it does not matter
    if_green = (blue - red).add_(chroma, alpha=2)
    if_blue = (red - green).add_(chroma, alpha=4)
    hue = torch.lerp(if_green, if_blue, (value - green).sign_(), out=if_green)
    hue = torch.lerp(green - blue, hue, (value - red).sign_(), out=hue)
    hue = hue.div_(chroma.clamp_min(1e-12)).add_((6 * shift)[:, None, None])
    hue = hue.sub_((hue / 6).floor_(), alpha=6)
    # each channel lacks chroma by how far, on the circle, the hue is from its own (0, 2 and 4 sixths)
    out = torch.empty_like(images)
    for channel, (center, sign, offset) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        lack = (hue - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(value, lack, chroma, value=-1, out=out[:, channel])
    return out


def solarize(images: Tensor, threshold: float) -> Tensor:
    """`1 - x` where x is at least `threshold`, in (0, 1]."""
    above = (images - threshold).floor_().add_(1).clamp_(0, 1)
    return torch.lerp(images, 1 - images, above)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None) -> Tensor:
    """`(x - mean) / std` for each channel, in channels_last layout; into `out`, if given, in its type and layout."""
    if out is None:
        out = torch.empty_like(images, memory_format=torch.channels_last)
    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):
        out[:, channel] = (images[:, channel] - center).div_(scale)
    return out
