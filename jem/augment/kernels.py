"""Triton kernels of the fused augmentation; `jem.augment.fused` prepares their arguments and launches them.

Each program makes one tile of one image of one view, in float32. A *row* is one image of one view; its parameters are
one line of `table`, float32 (rows, 36):

    0-5     vertical: where output 0 begins, and the step from output to output, each as a float32 and what it lacks of
            the float64, in pixels of the image (from the box's far end and negative for a mirrored axis); then the
            box's start and end
    6-11    horizontal: the same
    12      standard deviation of the blur in pixels of the view
    13      place of this row among those that are blurred; -1: not blurred
    14      solarize threshold; above 1: not solarized
    15      which of the steps below needs the image's mean luma; -1: none
    16-35   five steps of colour (four of the jitter, then greyscale), of four numbers each: the weights of the image,
            of its luma and of its mean luma, and the shift of hue in turns
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from jem.augment.ops import LUMA

COLUMNS = constexpr(36)
HORIZONTAL = constexpr(6)
SIGMA = constexpr(12)
BLURRED = constexpr(13)
SOLARIZE = constexpr(14)
CONTRAST = constexpr(15)
STEPS = constexpr(16)
STEP_COUNT = constexpr(5)
LUMA_RED, LUMA_GREEN, LUMA_BLUE = (constexpr(weight) for weight in LUMA)


# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def contrast_means(
    images: tensor,
    table: tensor,
    parts: tensor,
    count: tensor,
    height: tensor,
    width: tensor,
    strides: tensor,
    size: tensor,
    white: constexpr,
    block_y: constexpr,
    block_x: constexpr,
) -> None:
    """Each tile's part, float32 (rows, tiles), of the mean luma that an image has when its contrast is changed.

    The parts are added up afterwards, in a fixed order: the same views every time. Those of rows without a change of
    contrast are left as they are.
    """
    row, y, x = _place(size, block_y, block_x)
    values = table + row * COLUMNS
    steps = tl.load(values + CONTRAST).to(tl.int32)
    if steps >= 0:
        colour = _sample(images, values, row % count, y, x, height, width, strides, white)
        red, green, blue = _jittered(colour, values, steps, 0.0)
        luma = tl.where(_within(y, x, size), _luma(red, green, blue), 0.0)
        tl.store(parts + tl.program_id(0), tl.sum(luma) / (size * size))


@triton.jit(do_not_specialize=["count"])
def crop_and_colour(
    images: tensor,
    table: tensor,
    means: tensor,
    out: tensor,
    sharp: tensor,
    count: tensor,
    height: tensor,
    width: tensor,
    strides: tensor,
    size: tensor,
    mean: tensor,
    std: tensor,
    white: constexpr,
    block_y: constexpr,
    block_x: constexpr,
) -> None:
    """Crop, flip, jitter and greyscale; into `sharp` for images that are to be blurred, finished into `out` for others.

    images: (count, 3, height, width) with `strides`; `white` is the value that stands for 1.
    means: float32 (rows,), see `contrast_means`; read only where contrast changes.
    out: (rows, size, size, 3). sharp: float32 (blurred rows, 3, size, size), in [0, 1], of each channel x by y.
    mean, std: of the three channels, for normalisation.
    """
    row, y, x = _place(size, block_y, block_x)
    values = table + row * COLUMNS
    average = tl.load(means + row, mask=tl.load(values + CONTRAST) >= 0, other=0.0)
    colour = _sample(images, values, row % count, y, x, height, width, strides, white)
    colour = _jittered(colour, values, STEP_COUNT, average)
    blurred = tl.load(values + BLURRED).to(tl.int32)
    if blurred >= 0:
        _store_transposed(sharp, colour, blurred, y, x, size)
    else:
        _finish(out, colour, values, row, y, x, size, mean, std)


@triton.jit
def blur_across(
    sharp: tensor,
    table: tensor,
    half: tensor,
    size: tensor,
    radius: constexpr,
    block_y: constexpr,
    block_x: constexpr,
) -> None:
    """Blur along x, from `sharp`, x by y, to `half`, y by x, both float32 (blurred rows, 3, size, size).

    The axis that is blurred is never the one whose neighbours are neighbours in memory: so a warp's reads are.
    """
    row, x, y = _place(size, block_y, block_x)
    values = table + row * COLUMNS
    blurred = tl.load(values + BLURRED).to(tl.int32)
    if blurred >= 0:
        colour = _blurred(sharp, values, blurred, x, y, size, radius)
        _store_transposed(half, colour, blurred, x, y, size)


@triton.jit
def blur_down(
    half: tensor,
    table: tensor,
    out: tensor,
    size: tensor,
    mean: tensor,
    std: tensor,
    radius: constexpr,
    block_y: constexpr,
    block_x: constexpr,
) -> None:
    """Blur along y, from `half`, and finish into the rows of `out`, (rows, size, size, 3), that are blurred."""
    row, y, x = _place(size, block_y, block_x)
    values = table + row * COLUMNS
    blurred = tl.load(values + BLURRED).to(tl.int32)
    if blurred >= 0:
        colour = _blurred(half, values, blurred, y, x, size, radius)
        _finish(out, colour, values, row, y, x, size, mean, std)


# --- places -------------------------------------------------------------------------------------------------------


@triton.jit
def _place(size: tensor, block_y: constexpr, block_x: constexpr) -> tl.tuple:
    """This program's row, and its pixels' y (block_y,) and x (block_x,); the last tiles reach beyond the view."""
    across = tl.cdiv(size, block_x)
    tiles = tl.cdiv(size, block_y) * across
    tile = tl.program_id(0) % tiles
    y = tile // across * block_y + tl.arange(0, block_y)
    x = tile % across * block_x + tl.arange(0, block_x)
    return tl.program_id(0) // tiles, y, x


@triton.jit
def _within(y: tensor, x: tensor, size: tensor) -> tensor:
    return (y < size)[:, None] & (x < size)[None, :]


# --- geometry -----------------------------------------------------------------------------------------------------


@triton.jit
def _sample(
    images: tensor,
    values: tensor,
    image: tensor,
    y: tensor,
    x: tensor,
    height: tensor,
    width: tensor,
    strides: tensor,
    white: constexpr,
) -> tl.tuple:
    """The crop's red, green and blue at outputs y, x, as `ops.resized_crop` makes them."""
    center_y, reach_y, top, bottom = _filter(values, y)
    center_x, reach_x, left, right = _filter(values + HORIZONTAL, x)
    first_y = tl.floor(center_y - reach_y + 0.5)  # the first pixel whose middle the filter reaches
    first_x = tl.floor(center_x - reach_x + 0.5)
    pixels = images + image.to(tl.int64) * strides[0]
    total = tl.zeros([y.shape[0], x.shape[0]], tl.float32)
    red = total
    green = total
    blue = total
    # four taps at a time, whose reads do not wait for each other: all there are, where the crop is enlarged
    for tap_y in range(0, tl.ceil(2 * reach_y).to(tl.int32), 2):
        for tap_x in range(0, tl.ceil(2 * reach_x).to(tl.int32), 2):
            for tap in tl.static_range(4):
                pixel_y = first_y + tap_y + tap // 2
                pixel_x = first_x + tap_x + tap % 2
                weight_y = _weight(pixel_y, center_y, reach_y, top, bottom, height)
                weight_x = _weight(pixel_x, center_x, reach_x, left, right, width)
                weight = weight_y[:, None] * weight_x[None, :]
                row, column = pixel_y.to(tl.int32) * strides[2], pixel_x.to(tl.int32) * strides[3]
                at = pixels + row[:, None] + column[None, :]
                reads = weight > 0
                total += weight
                red += weight * tl.load(at, mask=reads, other=0).to(tl.float32)
                green += weight * tl.load(at + strides[1], mask=reads, other=0).to(tl.float32)
                blue += weight * tl.load(at + 2 * strides[1], mask=reads, other=0).to(tl.float32)
    scale = 1 / tl.maximum(total * white, 1e-30)  # outputs beyond the view may reach no pixel
    return red * scale, green * scale, blue * scale


@triton.jit
def _filter(values: tensor, output: tensor) -> tl.tuple:
    """Along one axis: the centre and reach of each output's triangle filter, and the box's start and end, in pixels."""
    position = output + 0.5
    step = tl.load(values + 2)
    center = tl.load(values) + step * position + (tl.load(values + 1) + tl.load(values + 3) * position)
    return center, tl.maximum(tl.abs(step), 1.0), tl.load(values + 4), tl.load(values + 5)


@triton.jit
def _weight(pixel: tensor, center: tensor, reach: tensor, start: tensor, end: tensor, pixels: tensor) -> tensor:
    """What a pixel counts in a filter: less towards its ends, and by the pixel's part that is inside the box."""
    inside = _clamp(tl.minimum(pixel + 1, end) - tl.maximum(pixel, start))
    weight = inside * tl.maximum(1 - tl.abs(pixel + 0.5 - center) / reach, 0.0)
    return tl.where((pixel >= 0) & (pixel < pixels), weight, 0.0)


@triton.jit
def _blurred(
    planes: tensor,
    values: tensor,
    blurred: tensor,
    first: tensor,
    second: tensor,
    size: tensor,
    radius: constexpr,
) -> tl.tuple:
    """`ops.gaussian_blur` along the planes' first axis: red, green and blue at `first` x `second`."""
    sigma = tl.load(values + SIGMA)
    within = _within(first, second, size)
    total = 0.0
    red = tl.zeros([first.shape[0], second.shape[0]], tl.float32)
    green = red
    blue = red
    for tap in tl.static_range(2 * radius + 1):
        distance = (tap - radius) / sigma
        weight = tl.exp(-0.5 * distance * distance)
        at = _planes(planes, blurred, _reflected(first + tap - radius, size), second, size)
        total += weight
        red += weight * tl.load(at, mask=within, other=0.0)
        green += weight * tl.load(at + size * size, mask=within, other=0.0)
        blue += weight * tl.load(at + 2 * size * size, mask=within, other=0.0)
    return red / total, green / total, blue / total


@triton.jit
def _reflected(place: tensor, size: tensor) -> tensor:
    """Places before the first pixel and after the last, mirrored at those pixels."""
    return size - 1 - tl.abs(size - 1 - tl.abs(place))


# --- colour -------------------------------------------------------------------------------------------------------


@triton.jit
def _jittered(colour: tl.tuple, values: tensor, steps: tensor, mean: tensor) -> tl.tuple:
    """The first `steps` of the row's steps of colour, each as `ops.blend` and then `ops.adjust_hue`."""
    red, green, blue = colour
    for step in tl.static_range(STEP_COUNT):
        if step < steps:
            weights = values + STEPS + 4 * step
            image = tl.load(weights)
            base = tl.load(weights + 1) * _luma(red, green, blue) + tl.load(weights + 2) * mean
            red = _clamp(image * red + base)
            green = _clamp(image * green + base)
            blue = _clamp(image * blue + base)
            shift = tl.load(weights + 3)
            if shift != 0:
                red, green, blue = _turn(red, green, blue, shift)
    return red, green, blue


@triton.jit
def _turn(red: tensor, green: tensor, blue: tensor, shift: tensor) -> tl.tuple:
    """Turn the hue by `shift` turns; the formula is that of `ops.adjust_hue`."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    sixths = tl.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixths = tl.where(value == red, green - blue, sixths) / tl.maximum(chroma, 1e-12) + 6 * shift
    sixths -= 6 * tl.floor(sixths / 6)
    red = value - chroma * _clamp(2 - tl.abs(sixths - 3))
    green = value - chroma * _clamp(tl.abs(sixths - 2) - 1)
    blue = value - chroma * _clamp(tl.abs(sixths - 4) - 1)
    return red, green, blue


@triton.jit
def _luma(red: tensor, green: tensor, blue: tensor) -> tensor:
    return LUMA_RED * red + LUMA_GREEN * green + LUMA_BLUE * blue


@triton.jit
def _clamp(number: tensor) -> tensor:
    return tl.minimum(tl.maximum(number, 0.0), 1.0)


# --- memory -------------------------------------------------------------------------------------------------------


@triton.jit
def _planes(planes: tensor, blurred: tensor, first: tensor, second: tensor, size: tensor) -> tensor:
    """Where the red of `first` x `second` is in `planes`, (blurred rows, 3, size, size)."""
    return planes + blurred.to(tl.int64) * (3 * size * size) + first[:, None] * size + second[None, :]


@triton.jit
def _store_transposed(
    planes: tensor, colour: tl.tuple, blurred: tensor, second: tensor, first: tensor, size: tensor
) -> None:
    """Put red, green and blue at `second` x `first` into `planes`, whose axes are the other way round."""
    red, green, blue = colour
    at = planes + blurred.to(tl.int64) * (3 * size * size) + first[None, :] * size + second[:, None]
    within = _within(second, first, size)
    tl.store(at, red, mask=within)
    tl.store(at + size * size, green, mask=within)
    tl.store(at + 2 * size * size, blue, mask=within)


@triton.jit
def _finish(
    out: tensor,
    colour: tl.tuple,
    values: tensor,
    row: tensor,
    y: tensor,
    x: tensor,
    size: tensor,
    mean: tensor,
    std: tensor,
) -> None:
    """Solarize, normalise, and store in the type of `out`, (rows, size, size, 3)."""
    red, green, blue = colour
    threshold, within = tl.load(values + SOLARIZE), _within(y, x, size)
    at = out + row.to(tl.int64) * (3 * size * size) + 3 * (y[:, None] * size + x[None, :])
    red = tl.where(red >= threshold, 1 - red, red)
    green = tl.where(green >= threshold, 1 - green, green)
    blue = tl.where(blue >= threshold, 1 - blue, blue)
    tl.store(at, ((red - mean[0]) / std[0]).to(out.dtype.element_ty), mask=within)
    tl.store(at + 1, ((green - mean[1]) / std[1]).to(out.dtype.element_ty), mask=within)
    tl.store(at + 2, ((blue - mean[2]) / std[2]).to(out.dtype.element_ty), mask=within)
