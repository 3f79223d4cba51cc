"""The fused kernels against the plain torch path, which has its own tests against torchvision.

Natively where there is a GPU. Everywhere, the same tests run in Triton's interpreter, on the CPU: in a process of
their own, because Triton reads `TRITON_INTERPRET` when it is imported, and must then be interpreted throughout.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jem.augment import fused, ops
from jem.augment.params import ViewParams, generator
from jem.augment.views import SOLARIZE_FROM, Augment, augment_view, on_canvas
from jem.batch import Batch
from jem.config import AugmentConfig, BlurConfig, JitterConfig, ViewConfig

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TOLERANCE = 5e-5  # of normalised values, up to 3

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="without a GPU, runs in Triton's interpreter, in another process"
)
compiles_kernels = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


@compiles_kernels
def test_these_tests_pass_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "test_views_as_they_are_drawn PASSED" in ended.stdout


@compiles_kernels
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["contrast_means", "crop_and_colour", "blur_across", "blur_down"])
def test_kernels_compile_for_gpus_that_are_not_here(name: str, capability: int) -> None:
    """The interpreter takes any Python; the compiler does not. A stride of 1 is a constant, as in channels_last."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from jem.augment import kernels

    kernel = getattr(kernels, name)
    floats = dict.fromkeys(("table", "parts", "means", "sharp", "half"), "*fp32")
    tuples = {"strides": ("i64", "constexpr", "i32", "i32"), "mean": ("fp32",) * 3, "std": ("fp32",) * 3}
    types = {"images": "*u8", "out": "*bf16", **floats, **tuples}
    known = {"white": 255, "radius": 11, "block_y": fused.BLOCK_Y, "block_x": fused.BLOCK_X}
    constants = {argument: known[argument] for argument in kernel.arg_names if argument in known}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    ones = {(kernel.arg_names.index("strides"), 1): 1} if "strides" in kernel.arg_names else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**constants, **ones})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert made.asm["cubin"]


def test_without_a_gpu_views_are_made_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused.available(torch.device("cpu"))

    class Broken:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("triton.runtime.driver", Broken())
    with pytest.warns(UserWarning, match="not fused, because Triton does not work here: Failed to find C compiler"):
        assert not fused._triton_works.__wrapped__()


# --- what the kernels make ------------------------------------------------------------------------------------------


def noise(count: int, height: int, width: int) -> torch.Tensor:
    """Random bytes, each pixel another colour, in the stream's layout: NHWC memory seen as NCHW."""
    shape, seeded = (count, height, width, 3), torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded).permute(0, 3, 1, 2)


def all_colours() -> torch.Tensor:
    """A 12 x 12 image with all colours whose channels are in {0, 1/2, 1}, and random ones."""
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
    rest = torch.rand(144 - 27, 3, generator=torch.Generator().manual_seed(1))
    return torch.cat([corners, rest]).T.reshape(3, 12, 12)


def unchanged(images: torch.Tensor, **changes: torch.Tensor) -> ViewParams:
    """Parameters that leave `images`, at their original size, as they are; but for `changes`."""
    count, _, height, width = images.shape
    never = torch.zeros(count, dtype=torch.bool)
    neutral = {
        "boxes": torch.tensor([[0, 0, height, width]], dtype=torch.float64).repeat(count, 1),
        "flip": never,
        "order": torch.arange(4).repeat(count, 1),
        "factors": torch.tensor([1.0, 1, 1, 0]).repeat(count, 1),
        "grey": never,
        "sigma": torch.zeros(count),
        "solarize": never,
    }
    return ViewParams(**{**neutral, **changes})


def fused_views(
    images: torch.Tensor,
    size: torch.Tensor,
    views: list[ViewConfig],
    params: list[ViewParams],
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    boxes = [on_canvas(drawn.boxes, size, *images.shape[2:]) for drawn in params]
    how = {"mean": MEAN, "std": STD, "solarize_from": SOLARIZE_FROM, "dtype": dtype}
    made = fused.make_views(images.to(DEVICE), boxes, views, params, **how)
    assert all(view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last) for view in made)
    return [view.cpu() for view in made]


def assert_parity(
    images: torch.Tensor, views: list[ViewConfig], params: list[ViewParams], size: torch.Tensor | None = None
) -> None:
    if size is None:
        size = torch.tensor([images.shape[2:]]).repeat(len(images), 1)
    floats = images / 255 if images.dtype == torch.uint8 else images
    for view, drawn, made in zip(views, params, fused_views(images, size, views, params), strict=True):
        expected = ops.normalize(augment_view(floats.contiguous(), size, view, drawn), MEAN, STD)
        torch.testing.assert_close(made, expected, rtol=0, atol=TOLERANCE)


@runs_kernels
@pytest.mark.parametrize("out_size", [5, 12, 37])
def test_crops_that_shrink_and_grow_and_end_inside_pixels(out_size: int) -> None:
    """Originals of other sizes than the canvas of 64 x 50, so that boxes are whole there and not on the canvas."""
    images = noise(6, 64, 50)
    size = torch.tensor([[64, 50], [64, 50], [97, 43], [31, 201], [500, 333], [64, 50]])
    boxes = [[0, 0, 64, 50], [7, 40, 9, 10], [11, 2, 86, 40], [1, 7, 5, 190], [490, 0, 10, 300], [63, 3, 1, 2]]
    flip = torch.tensor([False, True, False, True, True, False])
    drawn = unchanged(images, boxes=torch.tensor(boxes, dtype=torch.float64), flip=flip)
    assert_parity(images, [ViewConfig(size=out_size)], [drawn], size)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "every other column"])
def test_images_of_any_type_and_layout(dtype: torch.dtype, layout: str) -> None:
    images = noise(3, 20, 14)
    images = images if dtype == torch.uint8 else images / 255
    if layout == "every other column":
        images = images[..., ::2]
    elif layout == "contiguous":
        images = images.contiguous()
    assert_parity(images, [ViewConfig(size=9)], [unchanged(images, flip=torch.tensor([True, False, True]))])


@runs_kernels
def test_each_change_of_colour_alone() -> None:
    factors = [[0.3, 1, 1, 0], [1.7, 1, 1, 0], [1, 0, 1, 0], [1, 1.8, 1, 0], [1, 1, 0, 0], [1, 1, 2, 0]]
    factors += [[1, 1, 1, shift] for shift in (-0.5, -0.13, 1 / 6, 0.5)]
    images = all_colours().repeat(len(factors), 1, 1, 1)
    drawn = unchanged(images, factors=torch.tensor(factors, dtype=torch.float32))
    assert_parity(images, [ViewConfig(size=12)], [drawn])


@runs_kernels
def test_every_order_of_the_jitter_clamped_after_each_step() -> None:
    order = torch.tensor(list(itertools.permutations(range(4))))
    images = all_colours().repeat(24, 1, 1, 1)
    factors = torch.tensor([1.6, 1.9, 1.5, 0.1]).repeat(24, 1)
    factors[::5] = torch.tensor([0.5, 0.4, 0.3, -0.2])
    assert_parity(images, [ViewConfig(size=12)], [unchanged(images, order=order, factors=factors)])


@runs_kernels
def test_the_contrast_of_a_view_of_many_tiles_is_about_the_mean_of_all_of_it() -> None:
    images = noise(2, 9, 40)
    images[:, :, :, :20] //= 4
    factors = torch.tensor([[1.0, 0.2, 1, 0], [1, 1.5, 1, 0]])
    assert_parity(images, [ViewConfig(size=37)], [unchanged(images, factors=factors)])


@runs_kernels
def test_greyscale_and_solarize() -> None:
    images = all_colours().repeat(4, 1, 1, 1)
    grey, solarize = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    assert_parity(images, [ViewConfig(size=12)], [unchanged(images, grey=grey, solarize=solarize)])


@runs_kernels
@pytest.mark.parametrize(("out_size", "kernel"), [(12, 1), (12, 23), (37, 5)])
def test_blur_of_some_images(out_size: int, kernel: int) -> None:
    images = noise(4, 12, 12)
    sigma, solarize = torch.tensor([0.1, 0, 0.8, 2.0]), torch.tensor([False, True, True, False])
    view = ViewConfig(size=out_size, blur=BlurConfig(kernel=kernel))
    assert_parity(images, [view], [unchanged(images, sigma=sigma, solarize=solarize)])


def config() -> AugmentConfig:
    """Multi-crop: sizes and kernels that differ, one of them twice, not next to each other."""
    jitter = JitterConfig(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    rich = ViewConfig(size=19, jitter=jitter, grey=0.3, blur=BlurConfig(kernel=9), solarize=0.4)
    local = rich.model_copy(update={"count": 2, "size": 8, "scale": (0.05, 0.3), "blur": BlurConfig(kernel=3)})
    plain = ViewConfig(size=19, jitter=None, grey=0)
    return AugmentConfig(views=(rich, local, plain, rich), mean=MEAN, std=STD)


@runs_kernels
def test_views_as_they_are_drawn() -> None:
    augment, images, size = Augment(config()), noise(3, 40, 44), torch.tensor([[60, 47], [40, 44], [33, 100]])
    assert_parity(images, augment.views, augment.draw(size, generator(0, 0, 0, 0)), size)


@runs_kernels
def test_bfloat16_views_are_those_of_float32_rounded_and_always_the_same() -> None:
    """Rounded to the nearest by a GPU, towards zero by Triton's interpreter: within one step of bfloat16."""
    augment, images, size = Augment(config()), noise(3, 40, 44), torch.tensor([[60, 47], [40, 44], [33, 100]])
    params = augment.draw(size, generator(1, 0, 0, 0))
    exact = fused_views(images, size, augment.views, params)
    once, again = (fused_views(images, size, augment.views, params, torch.bfloat16) for _ in range(2))
    for expected, one, other in zip(exact, once, again, strict=True):
        torch.testing.assert_close(one.float(), expected, rtol=2**-7, atol=TOLERANCE)
        assert torch.equal(one, other)


@runs_kernels
def test_an_augmentation_uses_the_kernels_where_they_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    augment, images = Augment(config()), noise(2, 30, 30)
    batch = Batch(images, torch.tensor([[50, 30], [30, 30]]), torch.arange(2), torch.arange(2))
    there = Batch(images.to(DEVICE), batch.size, batch.id.to(DEVICE), batch.label.to(DEVICE))
    expected = augment(batch, generator(0, 0, 0, 0)).views
    monkeypatch.setattr(fused, "available", lambda device: device.type == DEVICE.type)
    used, make_views = [], fused.make_views
    monkeypatch.setattr(fused, "make_views", lambda *args, **kwargs: used.append(1) or make_views(*args, **kwargs))
    made = augment(there, generator(0, 0, 0, 0)).views
    assert used
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=TOLERANCE)


@runs_kernels
def test_no_images_make_no_views() -> None:
    images = noise(1, 8, 8)[:0]
    assert fused_views(images, torch.zeros(0, 2), [ViewConfig(size=6)], [unchanged(images)])[0].shape == (0, 3, 6, 6)
