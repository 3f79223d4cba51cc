"""Batched augmentation: each image of a batch has its own parameters.

Images are float32 (N, 3, H, W) with values in [0, 1]. Given the same parameters, each operation equals torchvision's
functional one on that image. Nothing here waits for a GPU: shapes depend on arguments that are on the CPU.

Selections are arithmetic (sign, floor, lerp) rather than comparisons and `torch.where`: on a CPU, comparing or
selecting by a boolean tensor takes 0.7-1.7 ns per element, arithmetic 0.1-0.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

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

    Each output pixel is the sum of a few input pixels, first along the columns, then along the rows. The weights are
    those of `interpolate(mode="bilinear", align_corners=False, antialias=antialias)` on the crop. A box may end inside
    a pixel, which then counts by the part of it that is inside.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W), contiguous or channels_last.
        boxes: float (N, 4), top, left, height, width in pixels of `images`, inside it; on the device of `images`.
        out_size: side of the result in pixels.
        flip: bool (N,), mirrored left to right; on the device of `images`.
        antialias: widen the triangle filter where the crop shrinks.

    Returns:
        float32 (N, 3, out_size, out_size), in [0, 1]; contiguous, or (on a CPU) its transpose is.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.unbind(1)
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    images = images.to(torch.float32)
    if _gathers(images):
        rows = resize_taps(top, box_height, height, out_size, antialias=antialias)
        columns = resize_taps(left, box_width, width, out_size, flip, antialias=antialias)
        return gathered(images, Taps(rows.pixel, rows.weight * scale), columns)
    row_weights = resize_weights(top, box_height, height, out_size, antialias=antialias)
    column_weights = resize_weights(left, box_width, width, out_size, flip, antialias=antialias)
    return separable(images, row_weights * scale, column_weights)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur each image with its own Gaussian, edges reflected.

    Args:
        images: float32 (N, 3, H, W).
        sigma: float (N,), > 0, pixels.
        kernel: odd size in pixels, at most 2 * min(H, W) - 1.

    Returns:
        float32 (N, 3, H, W); contiguous, or (on a CPU) its transpose is.
    """
    height, width = images.shape[2:]
    rows, columns = (blur_taps(sigma, kernel, pixels) for pixels in (height, width))
    if _gathers(images):
        return gathered(images, rows, columns)
    return separable(images, dense(rows, height), dense(columns, width))


class Taps(NamedTuple):
    """Along one axis: of which pixels, at most K, each output pixel is the weighted sum."""

    pixel: Tensor
    """int64 (N, outputs, K), inside the axis."""
    weight: Tensor
    """float32 (N, outputs, K); 0 where there are fewer."""


def resize_taps(
    start: Tensor, length: Tensor, pixels: int, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Taps:
    """What resizes `pixels[start : start + length]` to `out_size` along one axis; for a CPU, as it looks at `length`.

    `start`, `length`: float (N,), in pixels; `flip`: bool (N,), last output first.
    """
    center, radius = _filters(start, length, out_size, flip, antialias=antialias)
    first = (center - radius).floor().clamp(min=0)
    pixel = first + torch.arange(int(2 * radius.max()) + 2, device=start.device)
    weight = _triangle(pixel, center, radius, start, length)
    return Taps(pixel.clamp_(max=pixels - 1).long(), weight)


def resize_weights(
    start: Tensor, length: Tensor, pixels: int, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Tensor:
    """The same as a matrix, float32 (N, out_size, pixels), whose rows sum to 1."""
    center, radius = _filters(start, length, out_size, flip, antialias=antialias)
    return _triangle(torch.arange(pixels, device=start.device), center, radius, start, length)


def _filters(
    start: Tensor, length: Tensor, out_size: int, flip: Tensor | None, *, antialias: bool
) -> tuple[Tensor, Tensor]:
    """Centre (N, out_size, 1) and radius (N, 1, 1) of the triangle filter of each output pixel, float64, in pixels."""
    start, length = start.to(torch.float64)[:, None], length.to(torch.float64)[:, None]
    outputs = torch.arange(out_size, device=start.device) + 0.5
    step = length / out_size
    position = outputs if flip is None else torch.where(flip[:, None], out_size - outputs, outputs)
    radius = step.clamp(min=1) if antialias else torch.ones_like(step)
    return (start + step * position)[:, :, None], radius[:, :, None]


def _triangle(pixel: Tensor, center: Tensor, radius: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Weights float32 (N, outputs, K) of the pixels of these numbers, by the part that is inside the box; sum 1."""
    low = start.to(torch.float64)[:, None, None]
    inside = torch.minimum(pixel + 1, low + length.to(torch.float64)[:, None, None]) - torch.maximum(pixel, low)
    weight = ((pixel + 0.5 - center).abs_() / -radius).add_(1).clamp_(min=0).mul_(inside.clamp_(0, 1))
    return weight.div_(weight.sum(dim=2, keepdim=True)).to(torch.float32)


def blur_taps(sigma: Tensor, kernel: int, pixels: int) -> Taps:
    """What blurs with a Gaussian along one axis, with reflection at both ends."""
    offsets = torch.arange(-(kernel // 2), kernel // 2 + 1, device=sigma.device)
    weight = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)
    pixel = (torch.arange(pixels, device=sigma.device)[:, None] + offsets).abs()
    pixel = (pixels - 1) - (pixels - 1 - pixel).abs()
    return Taps(*(each.expand(len(sigma), pixels, kernel) for each in (pixel, weight[:, None])))


def dense(taps: Taps, pixels: int) -> Tensor:
    """Taps as a matrix, float32 (N, outputs, pixels)."""
    return taps.weight.new_zeros(*taps.pixel.shape[:2], pixels).scatter_add_(2, taps.pixel, taps.weight)


def gathered(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """The sums along both axes, for a CPU: each pass gathers whole lines of memory, as in an embedding table.

    A crop of 256 to 224 pixels takes an eighth, and a blur of 23 pixels a seventh, of the time of `separable`, whose
    matrices are zero nearly everywhere.

    Args:
        images: float32 (N, C, H, W), contiguous or channels_last.
        rows: of the height.
        columns: of the width.

    Returns:
        float32 (N, C, outputs of the rows, outputs of the columns), whose transpose is contiguous.
    """
    if images.is_contiguous():
        columns_first = _sums(images, rows).transpose(2, 3)
    else:
        columns_first = _sums(images.permute(0, 2, 3, 1)[:, None], rows)[:, 0].permute(0, 3, 2, 1)
    return _sums(columns_first.contiguous(), columns).transpose(2, 3)


def _sums(lines: Tensor, taps: Taps) -> Tensor:
    """Weighted sums of lines: (N, G, L, ...) to (N, G, outputs, ...), where G groups have the same taps."""
    count, groups, length = lines.shape[:3]
    base = torch.arange(count * groups).view(count, groups, 1, 1) * length
    index = (taps.pixel[:, None] + base).flatten(0, 2)
    weight = taps.weight[:, None].expand(-1, groups, -1, -1).flatten(0, 2)
    table = lines.reshape(count * groups * length, -1)
    sums = torch.nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
    return sums.view(count, groups, -1, *lines.shape[3:])


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ channel @ columns.T` for each channel; `rows` (N, h, H), `columns` (N, w, W); in float32 always."""
    count, channels, height, width = images.shape
    with _no_autocast(images.device.type):
        narrow = torch.bmm(images.reshape(count, channels * height, width), columns.transpose(1, 2))
        return torch.matmul(rows[:, None], narrow.view(count, channels, height, -1))


def _gathers(images: Tensor) -> bool:
    """Where gathering is faster than a matrix product, and may look at the boxes (not in a program that is traced)."""
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


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
