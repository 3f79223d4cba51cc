"""The 3 x 3 patches that an image is cut into, for the jigsaw tasks.

Noroozi, Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", ECCV 2016, section 3.2: a
square of 225 pixels has cells of 75, and from each cell a patch of 64 is taken at a random place, so that the edges of
neighbours do not fit together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from jem.device import put
from jem.distributed import world
from jem.errors import InputError
from jem.methods.base import mine

if TYPE_CHECKING:
    from torch import Generator

PATCHES = 9
SHARE = 64 / 75
"""Side of a patch as a share of its cell's."""


def cut_patches(images: Tensor, size: int, generator: Generator, share: float = SHARE) -> Tensor:
    """Cut each image into 3 x 3 cells, and from each take a square patch at a random place in it.

    Args:
        images: this worker's, float (N, 3, H, W).
        size: side of the resulting patches in pixels, p; they are resized (bilinear, antialiased) if they are not so.
        generator: on the CPU, the same on every worker: the places are drawn for the global batch, so that W workers
            cut what one process would.
        share: side of a patch as a share of its cell's, which has H // 3 by W // 3 pixels; 1 leaves no choice.

    Returns:
        (N, 9, 3, p, p) of the type of `images`, row by row: patch 0 is the upper left one, 2 the upper right one.

    Raises:
        InputError: images of less than 3 pixels.
    """
    count, channels, height, width = images.shape
    if min(height, width) < 3:
        raise InputError(f"views of {height} x {width} pixels cannot be cut into 3 x 3 patches: raise the views' size")
    cell = torch.tensor([height // 3, width // 3])
    side = max(1, round(min(height, width) // 3 * share))
    drawn = torch.rand(world() * count, PATCHES, 2, generator=generator)
    # what H // 3 leaves over is a margin around the grid
    margin = (torch.tensor([height, width]) - 3 * cell) // 2
    corners = margin + cell * torch.cartesian_prod(torch.arange(3), torch.arange(3))
    starts = put(corners + (mine(drawn) * (cell - side + 1)).long(), images.device)
    within = torch.arange(side, device=images.device)
    rows, columns = starts[..., 0, None] + within, starts[..., 1, None] + within  # (N, 9, side) each
    image = torch.arange(count, device=images.device)[:, None, None, None]
    # indices around a slice put the channels last
    patches = images[image, :, rows[..., None], columns[..., None, :]].movedim(-1, 2)
    if side == size:
        return patches.contiguous()
    with torch.autocast(images.device.type, enabled=False):
        resized = functional.interpolate(
            patches.reshape(count * PATCHES, channels, side, side), size=(size, size), mode="bilinear", antialias=True
        )
    return resized.view(count, PATCHES, channels, size, size)
