"""A picture of what the augmentation does: each original beside its views, with what was drawn for each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from jem.augment.params import BRIGHTNESS, CONTRAST, HUE, SATURATION

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from jem.augment.params import ViewParams
    from jem.augment.views import Augment
    from jem.batch import Batch
    from jem.config import ViewConfig

CELL, GAP, LINE = 192, 8, 13
CAPTION_LINES = 3
INK, PAPER, MASKED = "#202020", "#ffffff", 128
BOX_COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#00a0a0", "#f032e6", "#808000")


def preview(batch: Batch, augment: Augment, generator: Generator) -> Image.Image:
    """One row per image: the original with the crops' boxes, then each view, with the parameters drawn for it.

    Args:
        batch: at least one image, on the CPU.
        augment: the views to show.
        generator: see `jem.augment.params.generator`; the same one gives the same views as training.

    Returns:
        RGB picture, 200 pixels per column and 240 per row, about.
    """
    params = augment.draw(batch.size, generator)
    views = [_pixels(view, drawn, augment) for view, drawn in zip(augment.apply(batch, params), params, strict=True)]
    names = [f"view {number} ({_told(view)})" for number, view in enumerate(augment.views, start=1)]

    wide, high = CELL + GAP, CELL + GAP + CAPTION_LINES * LINE
    picture = Image.new("RGB", ((1 + len(views)) * wide + GAP, len(batch) * high + LINE + 2 * GAP), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for column, name in enumerate(["original", *names]):
        colour = BOX_COLOURS[(column - 1) % len(BOX_COLOURS)] if column else INK
        pen.text((GAP + column * wide, GAP), name, fill=colour, font=font)
    for row in range(len(batch)):
        y = LINE + 2 * GAP + row * high
        height, width = batch.size[row].tolist()
        original, scale = _original(batch.image[row], height, width)
        for view, drawn in enumerate(params):
            _outline(original, drawn.boxes[row].tolist(), scale, BOX_COLOURS[view % len(BOX_COLOURS)])
        picture.paste(original, (GAP, y))
        pen.text((GAP, y + original.height), f"id {batch.id[row]}, {width} x {height}", fill=INK, font=font)
        for column, (pixels, drawn) in enumerate(zip(views, params, strict=True), start=1):
            x = GAP + column * wide
            picture.paste(_fitted(Image.fromarray(pixels[row].numpy()), CELL, CELL), (x, y))
            for line, text in enumerate(caption(drawn, row, height * width)):
                pen.text((x, y + CELL + line * LINE), text, fill=INK, font=font)
    return picture


def caption(drawn: ViewParams, row: int, pixels: int) -> list[str]:
    """What was drawn for one image of `pixels` pixels, in at most three lines."""
    _, _, height, width = drawn.boxes[row].tolist()
    crop = f"crop {100 * height * width / pixels:.0f} %, {width:.0f} x {height:.0f}"
    if drawn.flip[row]:
        crop += ", flip"
    factor = drawn.factors[row].tolist()
    steps = {
        BRIGHTNESS: f"bri {factor[BRIGHTNESS]:.2f}",
        CONTRAST: f"con {factor[CONTRAST]:.2f}",
        SATURATION: f"sat {factor[SATURATION]:.2f}",
        HUE: f"hue {factor[HUE]:+.2f}",
    }
    neutral = [1.0, 1.0, 1.0, 0.0]
    jitter = " ".join(steps[step] for step in drawn.order[row].tolist() if factor[step] != neutral[step])
    sigma = drawn.sigma[row].item()
    others = (("grey", drawn.grey[row]), (f"blur {sigma:.1f}", sigma > 0), ("solarize", drawn.solarize[row]))
    rest = ", ".join(name for name, happens in others if happens)
    return [line for line in (crop, jitter, rest) if line]


def _told(view: ViewConfig) -> str:
    masked = "" if view.mask is None else f", {100 * view.mask.ratio:.0f} % masked"
    return f"{view.size} px{masked}"


def _pixels(view: Tensor, drawn: ViewParams, augment: Augment) -> Tensor:
    """Undo the normalisation, and let masked patches be grey: uint8 (N, s, s, 3)."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (augment.config.mean, augment.config.std))
    pixels = (view.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    if drawn.mask is not None:
        side = math.isqrt(drawn.mask.shape[1])
        mask = drawn.mask.view(-1, 1, side, side)
        for dimension in (2, 3):
            mask = mask.repeat_interleave(pixels.shape[2] // side, dimension)
        pixels = pixels.masked_fill(mask, MASKED)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _original(image: Tensor, height: int, width: int) -> tuple[Image.Image, float]:
    """The canvas in the original's shape, fitted to a cell, and its scale against the original."""
    scale = CELL / max(height, width)
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return _fitted(canvas, max(1, round(width * scale)), max(1, round(height * scale))), scale


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pixels stay visible as squares where a small image is enlarged."""
    enlarged = width >= image.width and height >= image.height
    return image.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR)


def _outline(image: Image.Image, box: list[float], scale: float, colour: str) -> None:
    top, left, height, width = (side * scale for side in box)
    corners = [left, top, max(left, left + width - 1), max(top, top + height - 1)]
    ImageDraw.Draw(image).rectangle(corners, outline=colour, width=2)
