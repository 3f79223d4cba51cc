"""The picture of a recipe's views, and the job that writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from jem.augment.preview import CELL, GAP, LINE, caption, preview
from jem.augment.views import Augment, generator
from jem.batch import Batch
from jem.config import AugmentConfig, BlurConfig, JitterConfig, MaskConfig, PreviewConfig, StreamConfig, ViewConfig
from jem.errors import InputError
from pipelines.preview import preview as preview_job

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = ViewConfig(count=2, size=CELL, scale=(1, 1), ratio=(0.01, 100), flip=0, jitter=None, grey=0)


def batch_of(height: int, width: int, colour: tuple[int, int, int]) -> Batch:
    image = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    return Batch(image, torch.tensor([[height, width]], dtype=torch.int32), torch.tensor([7]), torch.tensor([0]))


def cell(picture: Image.Image, column: int) -> np.ndarray:
    x, y = GAP + column * (CELL + GAP), LINE + 2 * GAP
    return np.asarray(picture.crop((x, y, x + CELL, y + CELL)))


def test_an_original_is_shown_in_its_own_shape_beside_views_in_their_own_colours() -> None:
    picture = preview(batch_of(100, 200, (200, 100, 50)), Augment(AugmentConfig(views=(PLAIN,))), generator(0, 0, 0, 0))
    assert picture.width >= 3 * CELL
    original = cell(picture, 0)
    assert (original[20, 20] == (200, 100, 50)).all()
    assert (original[CELL // 2 + 20, 20] == 255).all()  # below an original that is half as high as it is wide
    for column in (1, 2):
        assert np.abs(cell(picture, column).astype(int) - (200, 100, 50)).max() <= 1


def test_the_boxes_of_the_crops_are_drawn_on_the_original() -> None:
    view = ViewConfig(size=32, scale=(0.2, 0.3), jitter=None, grey=0)
    augment = Augment(AugmentConfig(views=(view,)))
    batch = batch_of(CELL, CELL, (0, 0, 0))
    (drawn,) = augment.draw(batch.size, generator(3, 0, 0, 0))
    top, left, height, width = (int(side) for side in drawn.boxes[0].tolist())
    marked = cell(preview(batch, augment, generator(3, 0, 0, 0)), 0).any(axis=2)
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    assert (rows[0], rows[-1] + 1) == (top, top + height)
    assert (columns[0], columns[-1] + 1) == (left, left + width)


def test_masked_patches_are_grey_and_local_views_are_shown_beside_global_ones() -> None:
    masked = PLAIN.model_copy(update={"count": 1, "mask": MaskConfig(ratio=0.25, patch=CELL // 2)})
    local = PLAIN.model_copy(update={"count": 2, "size": 32})
    augment = Augment(AugmentConfig(views=(masked, local)))
    batch = batch_of(100, 200, (200, 100, 50))
    (drawn, *_) = augment.draw(batch.size, generator(0, 0, 0, 0))
    picture = preview(batch, augment, generator(0, 0, 0, 0))
    assert picture.width >= 4 * CELL
    assert drawn.mask is not None
    for patch, hidden in enumerate(drawn.mask[0].tolist()):
        top, left = CELL // 2 * (patch // 2), CELL // 2 * (patch % 2)
        shown = cell(picture, 1)[top : top + CELL // 2, left : left + CELL // 2].astype(int)
        assert np.abs(shown - ((128, 128, 128) if hidden else (200, 100, 50))).max() <= 1
    for column in (2, 3):
        assert np.abs(cell(picture, column).astype(int) - (200, 100, 50)).max() <= 1


def test_the_caption_says_what_was_drawn_and_nothing_else() -> None:
    everything = ViewConfig(
        size=32, flip=1, jitter=JitterConfig(p=1), grey=1, blur=BlurConfig(p=1, kernel=5), solarize=1
    )
    (drawn,) = Augment(AugmentConfig(views=(everything,))).draw(torch.tensor([[50, 80]]), generator(0, 0, 0, 0))
    crop, jitter, rest = caption(drawn, 0, 50 * 80)
    _, _, height, width = drawn.boxes[0].tolist()
    assert crop == f"crop {height * width / 40:.0f} %, {width:.0f} x {height:.0f}, flip"
    short = ["bri", "con", "sat", "hue"]
    assert jitter.split()[::2] == [short[step] for step in drawn.order[0]]
    assert rest == f"grey, blur {drawn.sigma[0]:.1f}, solarize"
    (plain,) = Augment(AugmentConfig(views=(PLAIN.model_copy(update={"count": 1}),))).draw(
        torch.tensor([[50, 80]]), generator(0, 0, 0, 0)
    )
    assert caption(plain, 0, 50 * 80) == ["crop 100 %, 80 x 50"]


def config_for(data: Path, out: Path, **settings: object) -> PreviewConfig:
    views = AugmentConfig(views=(ViewConfig(count=2, size=32),))
    return PreviewConfig(
        data=str(data), out=str(out), images=3, stream=StreamConfig(canvas=32), augment=views
    ).model_copy(update=settings)


def test_the_job_writes_a_picture_that_the_seed_decides(digits_dataset: Path, tmp_path: Path) -> None:
    pixels = []
    for number, seed in enumerate((0, 0, 1)):
        result = preview_job(config_for(digits_dataset, tmp_path / f"{number}.png", seed=seed))
        assert (result.images, result.views) == (3, 2)
        pixels.append(np.asarray(Image.open(result.path)))
    assert (pixels[0] == pixels[1]).all()
    assert not (pixels[0] == pixels[2]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_the_job_shows_all_images_of_a_small_set(digits_dataset: Path, tmp_path: Path) -> None:
    assert preview_job(config_for(digits_dataset, tmp_path / "a.png", limit=2)).images == 2


def test_the_job_replaces_a_picture_only_when_told_to(digits_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"exists: .*--overwrite"):
        preview_job(config_for(digits_dataset, out))
    assert out.read_bytes() == b"mine"
    preview_job(config_for(digits_dataset, out, overwrite=True))
    assert Image.open(out).format == "PNG"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a.txt", "ends in .png"), (".", "is a folder"), ("missing/a.png", "no folder"), ("a.jpg", "ends in .png")],
)
def test_the_job_refuses_a_name_that_cannot_be_its_picture(
    digits_dataset: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        preview_job(config_for(digits_dataset, tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_the_job_writes_nothing_where_there_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        preview_job(config_for(tmp_path / "nothing", tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())
