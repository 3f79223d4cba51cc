"""The views of a batch, all in one call, by the Triton kernels of `jem.augment.kernels`.

The reference is `views.augment_view` and `ops.normalize`; results differ from theirs by rounding only. Views of one
size and one blur kernel share every launch: each image of each of them is one row of one table of parameters. Images
are read where they are, in their own type and layout. No float32 image is kept in memory but for rows that are
blurred; where contrast changes, the crop is sampled twice instead.
"""

from __future__ import annotations

import warnings
from functools import cache
from subprocess import SubprocessError
from typing import TYPE_CHECKING

import numpy as np
import torch

from jem.augment import ops
from jem.augment.params import CONTRAST, HUE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from numpy.typing import NDArray
    from torch import Tensor

    from jem.augment.params import ViewParams
    from jem.config import ViewConfig

    Doubles: TypeAlias = NDArray[np.float64]

BLOCK_Y, BLOCK_X, WARPS = 8, 32, 4
"""Pixels of a tile, and what makes it. Of BYOL's two views of 256 images, 256 to 224 px, H200: 1.53 ms; 16 x 32 1.83,
8 x 64 1.62, 4 x 64 1.72, and with 8 warps 16 x 32 1.96, 16 x 64 2.33."""


def available(device: torch.device) -> bool:
    """Whether views can be made here on `device`: it is a GPU, and Triton works on this machine."""
    return device.type == "cuda" and _triton_works()


@cache
def _triton_works() -> bool:
    """Triton is not built for every platform, and it needs a C compiler when it first runs."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except ImportError:
        return False
    except (RuntimeError, OSError, SubprocessError) as error:
        warnings.warn(f"augmentation is not fused, because Triton does not work here: {error}", stacklevel=2)
        return False
    return True


def make_views(
    images: Tensor,
    boxes: Sequence[Tensor],
    views: Sequence[ViewConfig],
    params: Sequence[ViewParams],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    solarize_from: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Make each view of each image: crop, flip, jitter, greyscale, blur, solarize, normalise, in this order.

    One copy to the device, of 144 bytes for each image of each view; nothing waits for it.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W), of any layout: whole images, squashed to one shape.
        boxes: of each view, float64 (N, 4), top, left, height, width in pixels of `images`, inside it; on the CPU.
        views: the size and the blur's kernel of each view.
        params: the other parameters of each view's images.
        mean: of each channel, of images in [0, 1].
        std: likewise.
        solarize_from: the threshold, in (0, 1].
        dtype: of the views.

    Returns:
        For each view, `dtype` (N, 3, s, s), normalised, channels_last.
    """
    count = images.shape[0]
    groups: dict[tuple[int, int], list[int]] = {}
    for place, view in enumerate(views):
        groups.setdefault((view.size, view.blur.kernel if view.blur else 0), []).append(place)
    tables = [
        _table(torch.cat([boxes[place] for place in places]), [params[place] for place in places], size, solarize_from)
        for (size, _), places in groups.items()
    ]
    packed = torch.cat(tables)
    on_device = packed.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else packed

    made: dict[int, Tensor] = {}
    heights = [table.shape[0] for table in tables]
    for ((size, kernel), places), here, there in zip(
        groups.items(), tables, torch.split(on_device, heights), strict=True
    ):
        out = torch.empty((len(places), count, size, size, 3), dtype=dtype, device=images.device)
        if count:
            _launch(images, here, there, out.view(-1, size, size, 3), kernel // 2, tuple(mean), tuple(std))
        made |= zip(places, out.permute(0, 1, 4, 2, 3), strict=True)
    return [made[place] for place in range(len(views))]


def _launch(
    images: Tensor,
    here: Tensor,
    there: Tensor,
    out: Tensor,
    radius: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Fill `out` (rows, s, s, 3); the table of the rows is `here` on the CPU, `there` on the images' device."""
    from jem.augment import kernels

    rows, size = out.shape[:2]
    tiles = -(-size // BLOCK_Y) * -(-size // BLOCK_X)
    grid = (rows * tiles,)
    # fusion is said because its default changes with Triton 3.10, and 3.9 warns of that
    block = {"block_y": BLOCK_Y, "block_x": BLOCK_X, "num_warps": WARPS, "enable_fp_fusion": True}
    source = (images.shape[0], images.shape[2], images.shape[3], images.stride(), size)
    white = 255 if images.dtype == torch.uint8 else 1
    blurred = int((here[:, kernels.BLURRED.value] >= 0).sum())
    with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]
        means = there.new_empty(rows)
        if (here[:, kernels.CONTRAST.value] >= 0).any():
            parts = there.new_empty(rows, tiles)
            kernels.contrast_means[grid](images, there, parts, *source, white=white, **block)
            torch.sum(parts, dim=1, out=means)
        sharp = there.new_empty(blurred, 3, size, size)
        kernels.crop_and_colour[grid](images, there, means, out, sharp, *source, mean, std, white=white, **block)
        if blurred:
            half = torch.empty_like(sharp)
            kernels.blur_across[grid](sharp, there, half, size, radius=radius, **block)
            kernels.blur_down[grid](half, there, out, size, mean, std, radius=radius, **block)


def _table(boxes: Tensor, params: Sequence[ViewParams], size: int, solarize_from: float) -> Tensor:
    """The kernels' table of parameters, float32 (rows, 36), on the CPU; rows: view after view, image after image."""
    names = ("flip", "order", "factors", "grey", "sigma", "solarize")
    joined = [torch.cat([getattr(drawn, name) for drawn in params]) for name in names]
    steps = np.zeros((len(boxes), 5, 4), np.float32)
    steps[:, :4, :3] = ops.blend_weights(joined[1], joined[2]).permute(2, 0, 1)
    # NumPy: an operation on arrays as small as these takes less time than one of torch
    flip, order, factors, grey, sigma, solarize = (tensor.numpy() for tensor in joined)
    top, left, height, width = boxes.to(torch.float64).numpy().T
    steps[:, :4, 3] = np.where(order == HUE, factors[:, HUE, None], 0)
    steps[:, 4, 0], steps[:, 4, 1] = ~grey, grey
    chosen = sigma > 0
    scalars = [
        *_axis(top, height, size, np.zeros_like(flip)),
        *_axis(left, width, size, flip),
        sigma,
        np.where(chosen, chosen.cumsum() - 1, -1),
        np.where(solarize, solarize_from, 2.0),
        np.where(factors[:, CONTRAST] != 1, (order == CONTRAST).argmax(axis=1), -1),
    ]
    table = np.concatenate([np.stack(scalars, axis=1), steps.reshape(len(steps), 20)], axis=1, dtype=np.float32)
    return torch.from_numpy(table)


def _axis(start: Doubles, length: Doubles, size: int, flip: NDArray[np.bool_]) -> list[Doubles]:
    """One axis' six columns of the table, from a box's start and length; all float64 (rows,)."""
    end, step = start + length, length / size
    columns = []
    for exact in (np.where(flip, end, start), np.where(flip, -step, step)):
        rounded = exact.astype(np.float32).astype(np.float64)
        columns += [rounded, exact - rounded]
    return [*columns, start, end]
