"""Jigsaw puzzles: the permutations are far apart, and the patches come in the order that is asked for."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from pydantic import ValidationError

from jem.batch import Views
from jem.config import BackboneConfig, JigsawConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.jigsaw import Jigsaw, distant_permutations, standard_patches
from jem.methods.patches import cut_patches

SMALL = BackboneConfig(stem="stride2")


def greedy(count: int, length: int) -> list[tuple[int, ...]]:
    """The same choice by plain loops."""
    every = list(permutations(range(length)))
    chosen = [every[0]]
    while len(chosen) < count:

        def distances(p: tuple[int, ...]) -> list[int]:
            return [sum(a != b for a, b in zip(p, q, strict=True)) for q in chosen]

        chosen.append(max(every, key=lambda p: (min(distances(p)), sum(distances(p)))))
    return chosen


@pytest.mark.parametrize(("count", "length"), [(2, 3), (6, 3), (8, 4), (24, 4), (10, 5)])
def test_permutations_are_chosen_greedily_by_distance(count: int, length: int) -> None:
    found = distant_permutations(count, length)
    assert [tuple(row) for row in found.tolist()] == greedy(count, length)
    assert len({tuple(row) for row in found.tolist()}) == count


def test_nine_patches_have_nine_orders_without_a_common_place_and_many_that_are_nearly_so() -> None:
    first = distant_permutations(9)
    assert min((a != b).sum() for a, b in combinations(first, 2)) == 9
    many = distant_permutations(64)
    assert torch.equal(many[:9], first)
    assert torch.equal(many, distant_permutations(64))
    assert min((a != b).sum() for a, b in combinations(many, 2)) >= 7
    assert all(row.sort().values.tolist() == list(range(9)) for row in many)


def test_more_permutations_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 6 permutations of 3, and not 7"):
        distant_permutations(7, 3)


def test_standard_patches_have_no_brightness_and_no_contrast() -> None:
    patches = 3 + 5 * torch.randn(2, 9, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    standard = standard_patches(patches)
    torch.testing.assert_close(standard.mean(dim=(3, 4)), torch.zeros(2, 9, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.std(dim=(3, 4), correction=0), torch.ones(2, 9, 3), rtol=1e-4, atol=0)
    assert not standard_patches(torch.ones(1, 9, 3, 4, 4)).any(), "a flat patch is 0"


def batch(n: int = 5, side: int = 24) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views([torch.randn(n, 3, side, side, generator=generator)], torch.arange(n), torch.full((n,), -1))


def make(**fields: object) -> Jigsaw:
    torch.manual_seed(0)
    method = build_method(JigsawConfig(**{"permutations": 6, "patch": 8, "classifier": (16,), **fields}), SMALL)
    assert isinstance(method, Jigsaw)
    return method


@pytest.mark.parametrize("normalise", [True, False])
def test_output_is_the_cross_entropy_of_the_patches_in_the_drawn_order(normalise: bool) -> None:
    method, given, progress = make(normalise=normalise), batch(), Progress(step=4, total=9)
    method.before_step(progress)
    out = method(given)
    generator = progress.generator()
    patches = cut_patches(given.views[0], 8, generator)
    patches = standard_patches(patches) if normalise else patches
    drawn = torch.randint(6, (5,), generator=generator)
    assert len(set(drawn.tolist())) > 1
    ordered = torch.stack(
        [
            torch.stack([patches[image, place] for place in method.permutations[number].tolist()])
            for image, number in enumerate(drawn.tolist())
        ]
    )
    y = method.backbone(ordered.flatten(0, 1)).view(5, 9, 512)
    logits = method.classifier(torch.cat(list(y.unbind(1)), dim=1))
    assert out.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, drawn).item(), rel=1e-5)
    assert out.terms["accuracy"].item() == pytest.approx((logits.argmax(1) == drawn).float().mean().item())
    torch.testing.assert_close(out.representation, y[:, 0].detach())
    torch.testing.assert_close(out.embedding, y[:, 0].detach())


def test_it_learns_the_puzzles_of_pictures_with_nine_kinds_of_patches() -> None:
    """Each place has its own pattern, so the order can be read off."""
    method = make(permutations=3, normalise=False)
    places = torch.arange(9.0).view(1, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (places / 4 - 1).repeat(16, 3, 1, 1) + 0.05 * torch.randn(16, 3, 24, 24)
    given = Views([images], torch.arange(16), torch.full((16,), -1))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    for step in range(8):
        method.before_step(Progress(step, 20))
        optimizer.zero_grad()
        method(given).loss.backward()
        optimizer.step()
    method.before_step(Progress(19, 20))
    assert method(given).terms["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("view", "backbone", "words"),
    [
        ({"size": 8}, {}, "8 pixels, too few for 3 x 3 patches: set size to 9 or more"),
        ({"size": 32, "mask": {"patch": 4}}, {"name": "vit_tiny", "patch": 4}, "has a mask, and the jigsaw puzzle"),
        ({"size": 42}, {"name": "vit_tiny", "patch": 7}, "patch 64 is not a multiple of backbone.patch 7"),
    ],
)
def test_views_that_make_no_puzzle_are_refused(view: dict, backbone: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate(
            {"data": "x", "augment": {"views": [view]}, "backbone": backbone, "method": {"name": "jigsaw"}}
        )
