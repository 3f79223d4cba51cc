"""Each operation against torchvision's functional one, image by image, with the same parameters.

torchvision computes in float32 too, in another order: values in [0, 1] agree to 1e-5 or better, stated in each test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from jem.augment import ops


def images_of(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(params=["gathered", "dense"], autouse=True)
def _both_ways_to_resample(request: pytest.FixtureRequest) -> Iterator[None]:
    """A CPU gathers, a GPU and an exported program multiply matrices: each test runs with both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_gathers", lambda _: request.param == "gathered")
        yield


def extreme_colours() -> torch.Tensor:
    """A 12 x 12 image of all colours with channels in {0, 1/2, 1}, and random ones."""
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3))).T.reshape(3, 27)
    rest = torch.rand(3, 144 - 27, generator=torch.Generator().manual_seed(1))
    return torch.cat([corners, rest], dim=1).reshape(3, 12, 12)


@st.composite
def crops(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int, int]]]:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append(
            (
                draw(st.integers(0, height - box_height)),
                draw(st.integers(0, width - box_width)),
                box_height,
                box_width,
            )
        )
    return height, width, boxes


@given(crops(), st.integers(1, 40), st.booleans())
def test_resized_crop_equals_torchvision_on_whole_boxes(
    crop: tuple[int, int, list[tuple[int, int, int, int]]], out_size: int, antialias: bool
) -> None:
    height, width, boxes = crop
    images = images_of(len(boxes), height, width)
    actual = ops.resized_crop(images, torch.tensor(boxes, dtype=torch.float64), out_size, antialias=antialias)
    for image, box, made in zip(images, boxes, actual, strict=True):
        expected = tv.resized_crop(image, *box, [out_size, out_size], InterpolationMode.BILINEAR, antialias)
        close(made, expected, 5e-6)


def test_resized_crop_flips_the_images_that_are_to_be_flipped() -> None:
    images, boxes = images_of(3, 20, 30), torch.tensor([[2.0, 3, 10, 21]]).expand(3, 4)
    plain = ops.resized_crop(images, boxes, 16)
    flipped = ops.resized_crop(images, boxes, 16, torch.tensor([True, False, True]))
    close(flipped[0], tv.horizontal_flip(plain[0]), 1e-6)
    close(flipped[1], plain[1], 0)
    close(flipped[2], tv.horizontal_flip(plain[2]), 1e-6)


def test_resized_crop_reads_bytes_as_fractions_of_255() -> None:
    images = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes = torch.tensor([[0.0, 0, 24, 24], [1, 2, 3, 4], [10, 10, 14, 14], [5, 0, 19, 7]])
    close(ops.resized_crop(images, boxes, 12), ops.resized_crop(images / 255, boxes, 12), 1e-6)


@given(st.floats(0, 20), st.floats(4, 20), st.floats(0, 20), st.floats(4, 20), st.integers(2, 24))
def test_resized_crop_samples_boxes_that_end_inside_pixels_where_they_are(
    top: float, height: float, left: float, width: float, out_size: int
) -> None:
    """On a linear image, a symmetric filter gives the value at its centre, wherever it does not meet the box's edge."""
    side = 40
    ramp = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    image = torch.stack([ramp[:, None].expand(side, side), ramp.expand(side, side), torch.zeros(side, side)])
    made = ops.resized_crop(image[None], torch.tensor([[top, left, height, width]], dtype=torch.float64), out_size)[0]
    for channel, (start, length) in enumerate(((top, height), (left, width))):
        step = length / out_size
        centers = start + step * (torch.arange(out_size, dtype=torch.float64) + 0.5)
        reach = max(step, 1) + 1  # a pixel is cut where the filter meets the edge
        inner = (centers - reach >= start) & (centers + reach <= start + length)
        line = made[channel].mean(dim=1 - channel).double()
        tolerance = 0.1 / side if step > 1 else 2e-6  # widened over whole pixels, the filter is not quite symmetric
        close(line[inner], centers[inner] / side, tolerance)
        assert line.min() >= (start - 0.5) / side
        assert line.max() <= (start + length + 0.5) / side


def test_resized_crop_never_looks_outside_its_box() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:20, 4:28] = 1
    assert ops.resized_crop(image, torch.tensor([[8.0, 4, 12, 24]]), 16).min() > 1 - 1e-6
    assert ops.resized_crop(image, torch.tensor([[8.25, 4.5, 11.5, 23]]), 7).min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("ours", "theirs", "factors", "tolerance"),
    [
        (ops.adjust_brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.4], 1e-6),
        (ops.adjust_contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.8], 1e-6),
        (ops.adjust_saturation, tv.adjust_saturation, [0.0, 0.8, 1.0, 2.0], 1e-6),
        (ops.adjust_hue, tv.adjust_hue, [-0.5, -0.13, 0.1, 0.5], 5e-6),
        (ops.adjust_hue, tv.adjust_hue, [0.0, 1 / 6, -1 / 3, 0.25], 5e-6),
    ],
)
def test_each_image_has_its_own_colour_as_torchvision_makes_it(ours, theirs, factors, tolerance) -> None:
    images = torch.stack([extreme_colours(), *images_of(2, 12, 12), extreme_colours().flip(0)])
    actual = ours(images, torch.tensor(factors))
    for image, factor, made in zip(images, factors, actual, strict=True):
        close(made, theirs(image, factor), tolerance)


def test_no_turn_of_hue_changes_nothing_but_rounding() -> None:
    images = extreme_colours()[None]
    close(ops.adjust_hue(images, torch.zeros(1)), images, 1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_blends_and_hue_in_any_order_equal_torchvision_in_that_order(order: tuple[int, ...]) -> None:
    factors = [1.3, 0.7, 1.15, 0.08]
    theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    expected = image = extreme_colours()
    for step in order:
        expected = theirs[step](expected, factors[step])
    made = image[None]
    weights = ops.blend_weights(torch.tensor([order]), torch.tensor([factors]))
    for step, weight in zip(order, weights, strict=True):
        made = ops.blend(made, *weight)
        if step == 3:
            made = ops.adjust_hue(made, torch.tensor([factors[3]]))
    close(made[0], expected, 1e-5)


def test_greyscale_equals_torchvision() -> None:
    images = images_of(3, 9, 11)
    close(ops.greyscale(images), tv.rgb_to_grayscale(images, num_output_channels=3), 1e-6)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_solarize_equals_torchvision_at_the_threshold_too(threshold: float) -> None:
    images = extreme_colours()[None]
    edge = torch.tensor([threshold, math.nextafter(threshold, 0)], dtype=torch.float32)
    images[0, 0, 0, :2] = edge
    close(ops.solarize(images, threshold), tv.solarize(images, threshold), 1e-7)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_blur_equals_torchvision_with_a_sigma_for_each_image(height: int, width: int, data: st.DataObject) -> None:
    kernel = 2 * data.draw(st.integers(0, min(height, width) - 1)) + 1
    sigmas = data.draw(st.lists(st.floats(0.1, 5), min_size=1, max_size=3))
    images = images_of(len(sigmas), height, width)
    actual = ops.gaussian_blur(images, torch.tensor(sigmas), kernel)
    for image, sigma, made in zip(images, sigmas, actual, strict=True):
        close(made, tv.gaussian_blur(image, [kernel, kernel], [sigma, sigma]), 1e-5)


def test_normalize_equals_torchvision_and_is_channels_last() -> None:
    images, mean, std = images_of(2, 8, 8), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    actual = ops.normalize(images, mean, std)
    close(actual, tv.normalize(images, list(mean), list(std)), 1e-6)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_colours_stay_in_range() -> None:
    images = torch.cat([extreme_colours()[None]] * 4)
    for factor in (0.0, 3.0):
        for operation in (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation):
            made = operation(images, torch.full((4,), factor))
            assert made.min() >= 0
            assert made.max() <= 1


def test_autocast_does_not_coarsen_geometry() -> None:
    images, boxes = images_of(2, 32, 32), torch.tensor([[1.0, 2, 20, 25]]).expand(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cropped, blurred = ops.resized_crop(images, boxes, 16), ops.gaussian_blur(images, torch.ones(2), 5)
    assert cropped.dtype == blurred.dtype == torch.float32
    close(cropped, ops.resized_crop(images, boxes, 16), 0)
    close(blurred, ops.gaussian_blur(images, torch.ones(2), 5), 0)


@pytest.mark.parametrize(
    ("box", "out_size"),
    [((3.25, 5.5, 20.375, 18.75), 5), ((0.75, 1.125, 30.5, 29.875), 4), ((7.5, 7.5, 12.0, 12.0), 2)],
)
def test_a_pixel_that_the_box_cuts_counts_by_its_part_inside(box: tuple[float, ...], out_size: int) -> None:
    """The oracle: torchvision's crop of the image with each pixel repeated 8 x 8 times, in which the box is whole."""
    image = images_of(1, 32, 32)
    image[:, :, int(box[0])] += 4  # a bright row and column where the box begins
    image[:, :, :, int(box[1])] += 4
    fine = image.repeat_interleave(8, 2).repeat_interleave(8, 3)
    whole = [int(8 * side) for side in box]
    expected = tv.resized_crop(fine, *whole, [out_size, out_size], antialias=True)
    close(ops.resized_crop(image, torch.tensor([box]), out_size), expected, 0.1)  # counted in full: 0.22 or more off
