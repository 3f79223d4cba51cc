"""Whole views: against torchvision's operations in sequence, in the original's geometry, drawn again the same."""

from __future__ import annotations

import io
import itertools
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from jem.augment import views as views_module
from jem.augment.views import Augment, centre_view, generator, prefetched
from jem.batch import Batch
from jem.config import AugmentConfig, BlurConfig, JitterConfig, MaskConfig, ViewConfig

if TYPE_CHECKING:
    from pathlib import Path

    from jem.augment.params import ViewParams

RICH = ViewConfig(
    size=24,
    scale=(0.2, 1.0),
    jitter=JitterConfig(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    grey=0.3,
    blur=BlurConfig(p=0.5, kernel=9),
    solarize=0.3,
)


def batch_of(images: torch.Tensor, size: torch.Tensor | None = None) -> Batch:
    count, _, height, width = images.shape
    if size is None:
        size = torch.tensor([[height, width]], dtype=torch.int32).repeat(count, 1)
    return Batch(images, size, torch.arange(count), torch.arange(count) % 10)


def noise(count: int, side: int = 40) -> Batch:
    """Smooth random images of all colours."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    images = tv.resize(coarse, [side, side], antialias=True).mul(255).round().to(torch.uint8)
    return batch_of(images.contiguous(memory_format=torch.channels_last))


def by_torchvision(image: torch.Tensor, view: ViewConfig, drawn: ViewParams, row: int) -> torch.Tensor:
    """One view of one image (3, H, W) by torchvision's functional operations."""
    image = tv.to_dtype(image, torch.float32, scale=True)
    box = [int(side) for side in drawn.boxes[row].tolist()]
    image = tv.resized_crop(image, *box, [view.size, view.size], antialias=True)
    if drawn.flip[row]:
        image = tv.horizontal_flip(image)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for step in drawn.order[row].tolist():
        image = operations[step](image, drawn.factors[row, step].item())
    if drawn.grey[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if drawn.sigma[row] > 0:
        assert view.blur is not None
        image = tv.gaussian_blur(image, [view.blur.kernel] * 2, [drawn.sigma[row].item()] * 2)
    if drawn.solarize[row]:
        image = tv.solarize(image, 0.5)
    return image


def test_views_equal_torchvisions_operations_with_the_same_parameters() -> None:
    augment, batch = Augment(AugmentConfig(views=(RICH, ViewConfig(size=16, blur=None)))), noise(64)
    params = augment.draw(batch.size, generator(0, 0, 0, 0))
    mean, std = list(augment.config.mean), list(augment.config.std)
    for view, drawn, made in zip(augment.views, params, augment.apply(batch, params), strict=True):
        for row in range(len(batch)):
            expected = tv.normalize(by_torchvision(batch.image[row], view, drawn, row), mean, std)
            torch.testing.assert_close(made[row], expected, rtol=0, atol=1e-4)  # of normalised values, up to 2.6


def test_photographs_views_equal_torchvisions(shared_data: Path) -> None:
    """At canvas = original size, real photographs, the usual 224 pixels."""
    augment = Augment(AugmentConfig(views=(ViewConfig(count=2, blur=BlurConfig(), solarize=0.2),)))
    for path in sorted((shared_data / "photos").iterdir())[:4]:
        pixels = np.array(Image.open(path).convert("RGB"))
        batch = batch_of(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        params = augment.draw(batch.size, generator(5, 0, 0, 0))
        mean, std = list(augment.config.mean), list(augment.config.std)
        for view, drawn, made in zip(augment.views, params, augment.apply(batch, params), strict=True):
            expected = tv.normalize(by_torchvision(batch.image[0], view, drawn, 0), mean, std)
            torch.testing.assert_close(made[0], expected, rtol=0, atol=1e-4)


def disc(height: int, width: int) -> torch.Tensor:
    """A white disc, of radius a third of the shorter side, in the middle of a black (3, height, width) image."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2
    return inside.float().expand(3, -1, -1)


def extent(image: torch.Tensor) -> tuple[float, float]:
    """Height and width of what is white, in pixels, from a (3, h, w) image."""
    return image[0].amax(dim=1).sum().item(), image[0].amax(dim=0).sum().item()


@pytest.mark.parametrize(("height", "width"), [(300, 600), (480, 360), (200, 1000)])
def test_a_disc_in_a_photograph_that_is_not_square_becomes_the_ellipse_of_its_crop(height: int, width: int) -> None:
    """The canvas squashes the photograph; the crop's aspect is that which was drawn in the original's geometry."""
    squashed = tv.resize(disc(height, width), [256, 256], antialias=True)[None].repeat(50, 1, 1, 1)
    batch = batch_of(squashed, torch.tensor([[height, width]]).repeat(50, 1))
    view = ViewConfig(size=128, scale=(0.6, 1.0), jitter=None, grey=0)
    augment = Augment(AugmentConfig(views=(view,), mean=(0, 0, 0), std=(1, 1, 1)))
    (drawn,) = augment.draw(batch.size, generator(2, 0, 0, 0))
    (made,) = augment.apply(batch, [drawn])
    diameter, whole = 2 / 3 * min(height, width), 0
    for row in range(50):
        top, left, crop_height, crop_width = drawn.boxes[row].tolist()
        margins = ((height - diameter) / 2 - top, (width - diameter) / 2 - left)
        if min(margins) < 0 or margins[0] + diameter > crop_height or margins[1] + diameter > crop_width:
            continue
        whole += 1
        tall, wide = extent(made[row])
        assert tall == pytest.approx(128 * diameter / crop_height, abs=2.5)
        assert wide == pytest.approx(128 * diameter / crop_width, abs=2.5)
    assert whole >= 3


@pytest.mark.parametrize(("height", "width"), [(300, 600), (480, 360), (128, 128), (101, 64)])
def test_a_disc_stays_round_in_the_evaluation_view(height: int, width: int) -> None:
    squashed = tv.resize(disc(height, width), [256, 256], antialias=True)[None]
    made = centre_view(squashed, torch.tensor([[height, width]]), 96)[0]
    tall, wide = extent(made)
    assert tall == pytest.approx(64, abs=2)
    assert wide == pytest.approx(64, abs=2)


@pytest.mark.parametrize(("height", "width"), [(50, 30), (30, 64), (48, 48), (24, 24)])
def test_the_evaluation_view_is_torchvisions_central_square_resized(height: int, width: int) -> None:
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    square = tv.center_crop(images / 255, [min(height, width)])
    expected = tv.resize(square, [24, 24], antialias=True)
    torch.testing.assert_close(centre_view(images, None, 24), expected, rtol=0, atol=5e-6)
    sizes = torch.tensor([[height, width]], dtype=torch.int32).repeat(3, 1)
    torch.testing.assert_close(centre_view(images / 255, sizes, 24), expected, rtol=0, atol=5e-6)


def test_the_evaluation_view_of_an_image_at_its_size_is_the_image() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(centre_view(images, None, 32), images / 255, rtol=0, atol=1e-7)
    assert torch.equal(centre_view(images / 255, None, 32), images / 255)


def test_the_evaluation_view_can_be_exported_for_any_batch() -> None:
    class Module(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return centre_view(images, None, 16)

    images = torch.randint(0, 256, (3, 3, 20, 32), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (images,), dynamic_shapes=({0: batch},))
    more = torch.randint(0, 256, (7, 3, 20, 32), dtype=torch.uint8)
    torch.testing.assert_close(program.module()(more), centre_view(more, None, 16))


def test_the_same_step_makes_the_same_views_and_another_step_others() -> None:
    augment, batch = Augment(AugmentConfig(views=(RICH, RICH))), noise(8)
    once, again = (augment(batch, generator(0, 1, 2, 0)) for _ in range(2))
    other = augment(batch, generator(0, 1, 3, 0))
    for first, second, third in zip(once.views, again.views, other.views, strict=True):
        assert torch.equal(first, second)
        assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_views_of_an_image_differ_and_so_do_equal_images() -> None:
    one = noise(1)
    batch = batch_of(one.image.repeat(8, 1, 1, 1))
    made = Augment(AugmentConfig(views=(RICH.model_copy(update={"count": 2}),)))(batch, generator(0, 0, 0, 0))
    seen = [*made.views[0], *made.views[1]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_multi_crop_makes_global_views_first_and_then_local_ones() -> None:
    config = AugmentConfig(views=(ViewConfig(count=2, size=32), ViewConfig(count=3, size=12, scale=(0.05, 0.2))))
    batch = noise(4)
    made = Augment(config)(batch, generator(0, 0, 0, 0))
    assert [tuple(view.shape) for view in made.views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 12, 12)] * 3
    assert torch.equal(made.id, batch.id)
    assert torch.equal(made.label, batch.label)
    params = Augment(config).draw(batch.size, generator(0, 0, 0, 0))
    areas = torch.stack([drawn.boxes[:, 2] * drawn.boxes[:, 3] for drawn in params]) / 40**2
    assert (areas[2:] < 0.25).all()


def test_masks_come_with_the_views_that_have_them_and_change_no_pixel() -> None:
    masked = ViewConfig(size=32, mask=MaskConfig(patch=8))
    local = ViewConfig(count=2, size=16, mask=MaskConfig(patch=8, ratio=0.5))
    config = AugmentConfig(views=(masked, ViewConfig(size=32), local))
    batch = noise(4)
    made = Augment(config)(batch, generator(0, 0, 0, 0))
    assert made.masks is not None
    assert [None if mask is None else tuple(mask.shape) for mask in made.masks] == [(4, 16), None, (4, 4), (4, 4)]
    plain = AugmentConfig(views=(ViewConfig(size=32),))
    without = Augment(plain)(batch, generator(0, 0, 0, 0))
    assert without.masks is None
    assert torch.equal(made.views[0], without.views[0])
    again = Augment(config)(batch, generator(0, 0, 0, 0))
    assert again.masks is not None
    assert torch.equal(made.masks[0], again.masks[0])
    assert [mask is None for _, mask in made] == [False, True, False, False]


def test_masks_are_put_on_the_images_device() -> None:
    batch = noise(2)
    on_meta = Batch(batch.image.to("meta"), batch.size, batch.id, batch.label)
    made = Augment(AugmentConfig(views=(ViewConfig(size=32, mask=MaskConfig(patch=8)),)))(
        on_meta, generator(0, 0, 0, 0)
    )
    assert [mask.device.type for _, mask in made if mask is not None] == ["meta"]


def test_asymmetric_views_have_each_their_own_settings() -> None:
    plain = ViewConfig(size=40, scale=(1, 1), ratio=(1, 1), flip=0, jitter=None, grey=0)
    inverted = plain.model_copy(update={"solarize": 1.0})
    batch = batch_of(torch.full((3, 3, 40, 40), 0.75))
    config = AugmentConfig(views=(plain, inverted), mean=(0, 0, 0), std=(1, 1, 1))
    first, second = Augment(config)(batch, generator(0, 0, 0, 0)).views
    torch.testing.assert_close(first, torch.full_like(first, 0.75))
    torch.testing.assert_close(second, torch.full_like(second, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_channels_last_and_of_the_type_asked_for(dtype: torch.dtype) -> None:
    augment, batch = Augment(AugmentConfig(views=(RICH,))), noise(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = augment(batch, generator(0, 0, 0, 0), dtype).views[0]
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, augment(batch, generator(0, 0, 0, 0)).views[0].to(dtype))


def test_work_in_parts_changes_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    augment, batch = Augment(AugmentConfig(views=(RICH, ViewConfig(size=8, blur=None)))), noise(11)
    whole = augment(batch, generator(0, 0, 0, 0)).views
    monkeypatch.setattr(views_module, "CHUNK_FLOATS", 3 * 3 * 40 * 40)
    for one, other in zip(whole, augment(batch, generator(0, 0, 0, 0)).views, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_nothing_is_read_back_from_the_device() -> None:
    """The meta device has shapes and no values: reading one, or a shape that depends on values, raises there."""
    batch = noise(8)
    on_meta = Batch(batch.image.to("meta"), batch.size, batch.id, batch.label)
    made = Augment(AugmentConfig(views=(RICH, RICH)))(on_meta, generator(0, 0, 0, 0))
    assert [view.shape for view in made.views] == [(8, 3, 24, 24)] * 2
    assert centre_view(on_meta.image, batch.size.to("meta"), 16).shape == (8, 3, 16, 16)


def test_an_augmentation_travels_to_another_process() -> None:
    augment, batch = Augment(AugmentConfig(views=(RICH,))), noise(3)
    arrived = pickle.loads(pickle.dumps(augment))
    assert torch.equal(arrived(batch, generator(0, 0, 0, 0)).views[0], augment(batch, generator(0, 0, 0, 0)).views[0])


def test_prefetched_pairs_each_batch_with_the_views_of_its_own_step() -> None:
    augment = Augment(AugmentConfig(views=(RICH,)))
    batches = [noise(count) for count in (4, 3, 5)]
    steps = (generator(0, 0, step, 0) for step in itertools.count())
    pairs = list(prefetched(batches, steps, augment, torch.device("cpu")))
    assert [len(batch) for batch, _ in pairs] == [4, 3, 5]
    for step, (batch, made) in enumerate(pairs):
        assert torch.equal(made.views[0], augment(batch, generator(0, 0, step, 0)).views[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_made_ahead_on_a_gpu_equal_those_of_the_cpu_and_wait_for_nothing() -> None:
    augment, device = Augment(AugmentConfig(views=(RICH,))), torch.device("cuda")
    batches = [noise(8) for _ in range(4)]
    steps = [generator(0, 0, step, 0) for step in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [views.views[0] for _, views in prefetched(batches, steps, augment, device)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (batch, view) in enumerate(zip(batches, made, strict=True)):
        expected = augment(batch, generator(0, 0, step, 0)).views[0]
        torch.testing.assert_close(view.cpu(), expected, rtol=0, atol=1e-4)


def test_an_image_read_from_a_file_and_one_of_its_bytes_are_the_same_view() -> None:
    """The stream's layout, NHWC memory seen as NCHW, gives what a contiguous copy of it gives."""
    batch, buffer = noise(1), io.BytesIO()
    Image.fromarray(batch.image[0].permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    pixels = torch.from_numpy(np.array(Image.open(buffer)))
    read = batch_of(pixels.permute(2, 0, 1)[None])
    augment = Augment(AugmentConfig(views=(RICH,)))
    copied = batch_of(batch.image.contiguous())
    assert torch.equal(augment(read, generator(0, 0, 0, 0)).views[0], augment(copied, generator(0, 0, 0, 0)).views[0])
