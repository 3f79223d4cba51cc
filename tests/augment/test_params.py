"""The parameters follow torchvision's distributions, are different for each image and view, and can be drawn again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from jem.augment.params import ViewParams, crop_boxes, draw, generator
from jem.config import BlurConfig, JitterConfig, ViewConfig

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = 4000
LEAST_P = 0.01  # the draws are seeded: a test passes always or never


def sizes(height: int, width: int, count: int = DRAWS) -> torch.Tensor:
    return torch.tensor([[height, width]], dtype=torch.int32).expand(count, 2)


def of_torchvision(transform: v2.Transform, image: torch.Tensor, count: int = DRAWS) -> list[dict]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return [transform.make_params([image]) for _ in range(count)]


def assert_one_distribution(ours: torch.Tensor, theirs: list[float]) -> None:
    assert stats.ks_2samp(ours.numpy(), theirs).pvalue > LEAST_P


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (600, 200, (0.3, 1.0), (0.5, 2.0)),  # often does not fit, and falls back
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio) -> None:
    boxes = crop_boxes(sizes(height, width), scale, ratio, generator(0, 0, 0, 0))
    crop = v2.RandomResizedCrop(8, scale, ratio)
    theirs = of_torchvision(crop, torch.empty(3, height, width))
    top, left, box_height, box_width = boxes.unbind(1)
    features: list[tuple[torch.Tensor, Callable[[dict], float]]] = [
        (box_height * box_width, lambda d: d["height"] * d["width"]),
        (box_width / box_height, lambda d: d["width"] / d["height"]),
        (top, lambda d: d["top"]),
        (left, lambda d: d["left"]),
        (top + box_height, lambda d: d["top"] + d["height"]),
        (left + box_width, lambda d: d["left"] + d["width"]),
    ]
    for ours, feature in features:
        assert_one_distribution(ours, [feature(drawn) for drawn in theirs])


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (3, 100), (333, 40), (41, 300)])
def test_a_crop_that_never_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    scale, ratio = (1.0, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(sizes(height, width, 3), scale, ratio, generator(0, 0, 0, 0))
    drawn = of_torchvision(v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, height, width), count=1)[0]
    assert boxes.tolist() == [[drawn["top"], drawn["left"], drawn["height"], drawn["width"]]] * 3


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    st.integers(0, 2**31),
)
def test_every_crop_is_whole_pixels_inside_its_image(image_sizes, scale, ratio, seed) -> None:
    size = torch.tensor(image_sizes, dtype=torch.int32)
    scale, ratio = tuple(sorted(scale)), tuple(sorted(ratio))
    boxes = crop_boxes(size, scale, ratio, generator(seed, 0, 0, 0))
    top, left, height, width = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (torch.stack([top, left]) >= 0).all()
    assert (torch.stack([height, width]) >= 1).all()
    assert (top + height <= size[:, 0]).all()
    assert (left + width <= size[:, 1]).all()


def drawn_with(seed: int = 0, **view: object) -> ViewParams:
    return draw(ViewConfig.model_validate(view), sizes(64, 64), generator(seed, 0, 0, 0))


def test_jitter_factors_are_distributed_as_torchvisions() -> None:
    config = JitterConfig(p=1, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    factors = drawn_with(jitter=config).factors
    theirs = of_torchvision(v2.ColorJitter(0.4, 1.5, 0.2, 0.1), torch.empty(3, 8, 8))
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_one_distribution(factors[:, column], [drawn[f"{name}_factor"] for drawn in theirs])
    assert (factors[:, :3] >= 0).all()


def test_each_of_the_24_orders_of_jitter_is_as_likely() -> None:
    order = drawn_with(jitter=JitterConfig(p=1)).order
    assert order.sort(dim=1).values.eq(torch.arange(4)).all()
    _, counts = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1).unique(return_counts=True)
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(counts.numpy()).pvalue > LEAST_P


def test_blur_is_distributed_as_torchvisions() -> None:
    sigma = drawn_with(blur=BlurConfig(p=1, sigma=(0.1, 2.0))).sigma
    theirs = of_torchvision(v2.GaussianBlur(5, (0.1, 2.0)), torch.empty(3, 8, 8))
    assert_one_distribution(sigma, [drawn["sigma"][0] for drawn in theirs])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.8, 1.0])
def test_what_is_drawn_with_a_probability_happens_so_often(p: float) -> None:
    view = {"flip": p, "grey": p, "solarize": p, "jitter": JitterConfig(p=p), "blur": BlurConfig(p=p, kernel=5)}
    drawn = drawn_with(**view)
    jittered = (drawn.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    for happens in (drawn.flip, drawn.grey, drawn.solarize, jittered, drawn.sigma > 0):
        assert stats.binomtest(int(happens.sum()), DRAWS, p).pvalue > LEAST_P


def test_operations_happen_independently_of_each_other() -> None:
    half = {
        "flip": 0.5,
        "grey": 0.5,
        "solarize": 0.5,
        "jitter": JitterConfig(p=0.5),
        "blur": BlurConfig(p=0.5, kernel=5),
    }
    drawn = drawn_with(**half)
    jittered = drawn.factors[:, 0] != 1
    events = torch.stack([drawn.flip, drawn.grey, drawn.solarize, jittered, drawn.sigma > 0]).float()
    correlation = torch.corrcoef(events) - torch.eye(5)
    assert correlation.abs().max() < 4 / math.sqrt(DRAWS)


def test_without_jitter_and_blur_nothing_of_them_is_drawn() -> None:
    drawn = drawn_with(jitter=None, blur=None, grey=0, solarize=0)
    assert (drawn.factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    assert not drawn.sigma.any()


def test_each_image_has_its_own_parameters() -> None:
    drawn = drawn_with(jitter=JitterConfig(p=1), blur=BlurConfig(p=1))
    assert len(drawn.factors.unique(dim=0)) == DRAWS
    assert len(drawn.sigma.unique()) > 0.99 * DRAWS
    assert len(drawn.boxes.unique(dim=0)) > 0.9 * DRAWS


def test_the_same_four_numbers_draw_the_same_and_any_other_number_another() -> None:
    def drawn(*numbers: int) -> torch.Tensor:
        return torch.rand(8, generator=generator(*numbers))

    assert torch.equal(drawn(1, 2, 3, 4), drawn(1, 2, 3, 4))
    others = [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3)]
    assert all(not torch.equal(drawn(1, 2, 3, 4), drawn(*other)) for other in others)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    drawn_with(blur=BlurConfig())
    assert torch.equal(before, torch.random.get_rng_state())
