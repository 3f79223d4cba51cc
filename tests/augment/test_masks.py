"""Masks: exactly the stated share of every image's patches, others in each image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jem.augment.params import draw, generator
from jem.config import MaskConfig, ViewConfig


def view(side: int = 8, patch: int = 4, **mask: object) -> ViewConfig:
    """A view of `side` x `side` patches."""
    return ViewConfig(size=side * patch, mask=MaskConfig(patch=patch, **mask))


def masks(view: ViewConfig, count: int = 200, seed: int = 0) -> torch.Tensor:
    drawn = draw(view, torch.full((count, 2), 40), generator(seed, 0, 0, 0)).mask
    assert drawn is not None
    return drawn


@given(
    st.sampled_from(["random", "block"]),
    st.integers(2, 16),
    st.floats(0.05, 0.95),
    st.integers(1, 20),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_exactly_the_stated_share_is_hidden_in_every_image(
    kind: str, side: int, ratio: float, count: int, seed: int
) -> None:
    hidden = round(ratio * side * side)
    if not 0 < hidden < side * side:
        return
    drawn = masks(view(side, kind=kind, ratio=ratio), count, seed)
    assert drawn.dtype == torch.bool
    assert drawn.shape == (count, side * side)
    assert drawn.sum(dim=1).tolist() == [hidden] * count


@pytest.mark.parametrize("kind", ["random", "block"])
def test_each_image_has_its_own_mask_and_the_generator_decides(kind: str) -> None:
    config = view(14, kind=kind, ratio=0.4)
    drawn = masks(config)
    assert len(drawn.unique(dim=0)) > 195
    assert torch.equal(drawn, masks(config))
    assert not torch.equal(drawn, masks(config, seed=1))


def test_random_masks_hide_each_patch_as_often() -> None:
    drawn = masks(view(4, ratio=0.75), count=8000).float()
    assert drawn.mean(dim=0) == pytest.approx(0.75, abs=0.02)
    pairs = (drawn.T @ drawn / 8000)[~torch.eye(16, dtype=torch.bool)]  # P = 12/16 * 11/15 for any two
    assert pairs == pytest.approx(0.55, abs=0.03)


def neighbours(masks: torch.Tensor, side: int) -> float:
    """Share of the masked patches' neighbours that are masked too."""
    grid = masks.view(-1, side, side).float()
    both = (grid[:, 1:] * grid[:, :-1]).sum() + (grid[:, :, 1:] * grid[:, :, :-1]).sum()
    ends = grid[:, 1:].sum() + grid[:, :-1].sum() + grid[:, :, 1:].sum() + grid[:, :, :-1].sum()
    return float(2 * both / ends)


def components(mask: list[bool], side: int) -> int:
    """Number of connected regions of masked patches."""
    todo, count = {i for i, hidden in enumerate(mask) if hidden}, 0
    while todo:
        count += 1
        edge = [todo.pop()]
        while edge:
            row, column = divmod(edge.pop(), side)
            for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= y < side and 0 <= x < side and y * side + x in todo:
                    todo.remove(y * side + x)
                    edge.append(y * side + x)
    return count


def test_blocks_hang_together_where_random_patches_do_not() -> None:
    """14 x 14 patches of which 40 % are hidden, as BEiT has it."""
    block, random = (masks(view(14, kind=kind, ratio=0.4)) for kind in ("block", "random"))
    assert neighbours(block, 14) > 0.75
    assert neighbours(random, 14) == pytest.approx(77 / 195, abs=0.02)  # of the other patches as many as of all
    regions = [components(mask, 14) for mask in block.tolist()]
    assert sum(regions) / len(regions) < 4
    assert min(components(mask, 14) for mask in random.tolist()[:20]) > 8


def test_a_single_rectangle_has_the_stated_aspect() -> None:
    """With the whole share as the least area the first rectangle is all, but for what its rounding lacks."""
    drawn = masks(view(16, kind="block", ratio=0.125, block=32, aspect=(2.0, 2.0)))
    whole = [mask.view(16, 16).nonzero() for mask in drawn]
    sides = [(cells.amax(dim=0) - cells.amin(dim=0) + 1).tolist() for cells in whole]
    assert sides == [[8, 4]] * len(sides)


def test_the_other_parameters_are_those_of_the_view_without_a_mask() -> None:
    size = torch.tensor([[30, 40]]).repeat(50, 1)
    plain = ViewConfig(size=32)
    for kind in ("random", "block"):
        masked = plain.model_copy(update={"mask": MaskConfig(kind=kind, patch=4)})
        first, second = draw(plain, size, generator(0, 0, 0, 0)), draw(masked, size, generator(0, 0, 0, 0))
        for name, value in vars(first).items():
            assert name == "mask" or torch.equal(value, getattr(second, name))
        assert first.mask is None
        assert second.mask is not None
        assert torch.equal(second.rows(slice(3, 5)).mask, second.mask[3:5])


@pytest.mark.parametrize(("height", "width", "box"), [(40, 40, (0, 0, 40, 40)), (30, 50, (0, 10, 30, 30))])
def test_a_mask_in_place_of_the_crop_sees_the_central_square(height: int, width: int, box: tuple[int, ...]) -> None:
    config = ViewConfig(size=32, scale=(1, 1), ratio=(1, 1), mask=MaskConfig(patch=4))
    boxes = draw(config, torch.tensor([[height, width]]).repeat(20, 1), generator(0, 0, 0, 0)).boxes
    assert {tuple(row) for row in boxes.tolist()} == {box}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 30, "mask": {"patch": 4}}, r"30 pixels does not divide into patches of 4 \(mask.patch\)"),
        ({"size": 32, "mask": {"patch": 5}}, "set mask.patch to 4, or the view's size to a multiple of 5"),
        ({"size": 96, "mask": {"patch": 7}}, "set mask.patch to 8, or"),
        ({"size": 224, "mask": {"patch": 15}}, "set mask.patch to 16, or"),
        ({"size": 32, "mask": {"patch": 16, "ratio": 0.95}}, "0.95 of 4 patches hides 4"),
        ({"size": 32, "mask": {"patch": 16, "ratio": 0.01}}, "0.01 of 4 patches hides 0"),
        ({"size": 32, "mask": {"patch": 4, "ratio": 1.0}}, "less than 1"),
        ({"size": 32, "mask": {"patch": 4, "block": 3}}, "block is for kind: block"),
        ({"size": 32, "mask": {"patch": 4, "kind": "block", "aspect": [2, 1]}}, "from low to high"),
    ],
)
def test_masks_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewConfig.model_validate(settings)
