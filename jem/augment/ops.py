"""Batched augmentation: each image of a batch has its own parameters.

Images are float32 (N, 3, H, W) with values in [0, 1]. Given the same parameters, each operation equals torchvision's
functional one on that image. Nothing here waits for the device: shapes depend on arguments that are on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jem.augment.params import CONTRAST, HUE, SATURATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, ITU-R BT.601


# --- geometry -----------------------------------------------------------------------------------------------------


def resized_crop(
    images: Tensor, boxes: Tensor, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Tensor:
    """Crop each image to its own box and resize the crop to a square, bilinearly.

    Two batched matrix products, `rows @ image @ columns.T`, whose weights are those of `interpolate(mode="bilinear",
    align_corners=False, antialias=antialias)` on the crop. A box may end inside a pixel; that pixel then counts by the
    part of it that is inside.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W).
        boxes: float (N, 4), top, left, height, width in pixels of `images`, inside it; on the device of `images`.
        out_size: side of the result in pixels.
        flip: bool (N,), mirrored left to right; on the device of `images`.
        antialias: widen the triangle filter where the crop shrinks.

    Returns:
        float32 (N, 3, out_size, out_size), in [0, 1].
    """
    count, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    rows = resize_weights(top, box_height, height, out_size, antialias=antialias)
    columns = resize_weights(left, box_width, width, out_size, flip, antialias=antialias)
    if images.dtype == torch.uint8:
        rows = rows / 255
    with full_precision(images.device):
        # one product for all channels, then one for each: never copies the weights per channel
        narrow = torch.bmm(
            images.to(torch.float32).reshape(count, channels * height, width), columns.transpose(1, 2)
        ).view(count, channels, height, out_size)
        out = narrow.new_empty(count, channels, out_size, out_size)
        for channel in range(channels):
            out[:, channel] = torch.bmm(rows, narrow[:, channel])
    return out


def full_precision(device: torch.device) -> torch.autocast:
    """Autocast off: a resize in bfloat16 would be visible."""
    return torch.autocast(device.type, enabled=False)


def resize_weights(
    start: Tensor, length: Tensor, pixels: int, out_size: int, flip: Tensor | None = None, *, antialias: bool = True
) -> Tensor:
    """Weights float32 (N, out_size, pixels) that resize `pixels[start : start + length]` to `out_size`, along one axis.

    Rows sum to 1. `start`, `length`: float (N,), in pixels; `flip`: bool (N,), last output first.
    """
    start, length = start.to(torch.float64), length.to(torch.float64)
    outputs = torch.arange(out_size, device=start.device, dtype=torch.float64) + 0.5
    position = outputs.expand(start.shape[0], out_size)
    if flip is not None:
        position = torch.where(flip[:, None], out_size - position, position)
    step = (length / out_size)[:, None]
    center = start[:, None] + position * step
    support = step.clamp(min=1) if antialias else torch.ones_like(step)
    left_edges = torch.arange(pixels, device=start.device, dtype=torch.float64)
    end = (start + length)[:, None]
    inside = torch.minimum(left_edges + 1, end) - torch.maximum(left_edges, start[:, None])
    distance = ((left_edges + 0.5)[None, None] - center[:, :, None]).abs_()
    weights = (1 - distance / support[:, :, None]).clamp_(min=0) * inside.clamp(0, 1)[:, None]
    return (weights / weights.sum(dim=2, keepdim=True)).to(torch.float32)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur each image with its own Gaussian, edges reflected, as two batched matrix products.

    `sigma`: float (N,), > 0, pixels; `kernel`: odd size in pixels, at most 2 * min(H, W) - 1.
    """
    count, channels, height, width = images.shape
    rows = blur_weights(sigma, kernel, height)
    columns = rows if height == width else blur_weights(sigma, kernel, width)
    with full_precision(images.device):
        narrow = torch.bmm(images.reshape(count, channels * height, width), columns.transpose(1, 2))
        narrow = narrow.view(count, channels, height, width)
        return torch.stack([torch.bmm(rows, narrow[:, channel]) for channel in range(channels)], dim=1)


def blur_weights(sigma: Tensor, kernel: int, pixels: int) -> Tensor:
    """Weights float32 (N, pixels, pixels) of a Gaussian blur along one axis, with reflection at both ends."""
    half = kernel // 2
    offsets = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float32)
    taps = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)
    taps = torch.nn.functional.pad(taps, (0, 1))  # the last, 0, stands for everything out of reach
    here = torch.arange(pixels, device=sigma.device)
    weights = taps.new_zeros(sigma.shape[0], pixels * pixels)
    last = pixels - 1
    for source, exists in ((here, here >= 0), (-here, here > 0), (2 * last - here, here < last)):
        tap = source[None, :] - here[:, None] + half
        tap = torch.where(exists & (tap >= 0) & (tap < kernel), tap, kernel)
        weights += taps.index_select(1, tap.flatten())
    return weights.view(-1, pixels, pixels)


# --- colour -------------------------------------------------------------------------------------------------------


def grey(images: Tensor) -> Tensor:
    """Luma (N, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * GREY_WEIGHTS[0]).add_(green, alpha=GREY_WEIGHTS[1]).add_(blue, alpha=GREY_WEIGHTS[2])


def greyscale(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    return grey(images)[:, None].expand_as(images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`factor * image`, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the image's luma, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return blend(images, factor, factor.new_zeros(()), 1 - factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma, clamped to [0, 1]; `factor`: float (N,), >= 0."""
    return blend(images, factor, 1 - factor, factor.new_zeros(()))


def blend(images: Tensor, image_weight: Tensor, grey_weight: Tensor, mean_weight: Tensor) -> Tensor:
    """`image_weight * image + grey_weight * luma + mean_weight * mean(luma)`, clamped to [0, 1]; weights (N,) or ()."""
    luma = grey(images)
    mean = luma.mean(dim=(1, 2))
    base = torch.addcmul((mean * mean_weight)[:, None, None], luma, grey_weight[..., None, None])
    return torch.addcmul(base[:, None], images, image_weight[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by `shift`, float (N,), in turns (-0.5..0.5), with value and saturation kept."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # hue in sixths of a turn; where there is no chroma, any hue gives the same grey
    sixths = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    sixths.div_(chroma.clamp_min(1e-12)).add_((6 * shift)[:, None, None])
    sixths.sub_(torch.floor(sixths / 6), alpha=6)
    # each channel lacks chroma by its distance, on the circle, from its own hue (0, 2 and 4 sixths)
    lacks = (2 - (sixths - 3).abs_(), (sixths - 2).abs_().sub_(1), (sixths - 4).abs_().sub_(1))
    return torch.stack([torch.addcmul(value, lack.clamp_(0, 1), chroma, value=-1) for lack in lacks], dim=1)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """`1 - x` where x is at least `threshold`."""
    return torch.where(images >= threshold, 1 - images, images)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`(x - mean) / std` for each channel, as `dtype`, in channels_last layout."""
    out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):
        out[:, channel] = (images[:, channel] - center) / scale
    return out


def jitter_weights(order: Tensor, factors: Tensor) -> Tensor:
    """The jitter as `blend`'s weights: float32 (4 steps, 3 weights, N); a step of hue leaves its image as it is."""
    step_factor = factors.gather(1, order)
    rest = 1 - step_factor
    image = torch.where(order == HUE, 1.0, step_factor)
    luma = torch.where(order == SATURATION, rest, 0.0)
    mean = torch.where(order == CONTRAST, rest, 0.0)
    return torch.stack([image, luma, mean]).permute(2, 0, 1).contiguous()
