"""The 3 x 3 patches of the jigsaw tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from jem.errors import InputError
from jem.methods.patches import cut_patches
from tests.processes import run_on


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(3, 40), width=st.integers(3, 40), share=st.floats(0.3, 1.0), seed=st.integers(0, 99))
def test_each_patch_is_a_square_out_of_its_cell(height: int, width: int, share: float, seed: int) -> None:
    """Every pixel says where it comes from, so the place of each patch can be read off."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, torch.full_like(x, 7)]).double()
    cell_height, cell_width = height // 3, width // 3
    side = max(1, round(min(cell_height, cell_width) * share))
    patches = cut_patches(image.expand(2, -1, -1, -1), side, seeded(seed), share)
    assert patches.shape == (2, 9, 3, side, side)
    for each in patches:
        for number, patch in enumerate(each):
            row, column = divmod(number, 3)
            top, left = int(patch[0, 0, 0]), int(patch[1, 0, 0])
            first_row = (height - 3 * cell_height) // 2 + row * cell_height
            first_column = (width - 3 * cell_width) // 2 + column * cell_width
            assert first_row <= top <= first_row + cell_height - side
            assert first_column <= left <= first_column + cell_width - side
            assert torch.equal(patch, image[:, top : top + side, left : left + side])


def test_places_differ_from_image_to_image_and_cell_to_cell_and_reach_every_corner() -> None:
    ramp = torch.arange(30).double().expand(1, 3, 30, 30)
    left = cut_patches(ramp.expand(200, -1, -1, -1), 7, seeded(), share=0.7)[:, :, 0, 0, 0]
    for column in range(3):
        for row in range(3):
            assert set(left[:, 3 * row + column].tolist()) == {10 * column + offset for offset in range(4)}
    assert not torch.equal(left[:, 0] % 10, left[:, 1] % 10)


def test_patches_are_resized_with_antialiasing() -> None:
    images = torch.randn(3, 3, 30, 30, generator=seeded())
    raw, small = cut_patches(images, 9, seeded(5)), cut_patches(images, 4, seeded(5))
    expected = functional.interpolate(raw.flatten(0, 1), size=(4, 4), mode="bilinear", antialias=True)
    assert torch.equal(small.flatten(0, 1), expected)


def cut_own_part() -> torch.Tensor:
    images = torch.arange(6 * 3 * 21 * 21).double().view(6, 3, 21, 21)
    return cut_patches(images.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()], 5, seeded())


def test_two_workers_cut_what_one_process_would() -> None:
    images = torch.arange(6 * 3 * 21 * 21).double().view(6, 3, 21, 21)
    assert torch.equal(torch.cat(run_on(2, cut_own_part)), cut_patches(images, 5, seeded()))


def test_an_image_without_9_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="2 x 8 pixels cannot be cut"):
        cut_patches(torch.zeros(1, 3, 2, 8), 4, seeded())
