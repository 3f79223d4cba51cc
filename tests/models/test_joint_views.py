"""Views of one size go through the backbone together, where that is the same as one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jem.config import BackboneConfig
from jem.models.backbones import Backbone, build_backbone
from jem.models.branch import Branch
from tests.train.test_loop import config_of, run

VIT = BackboneConfig(name="vit_tiny", patch=4)
TOKENS = BackboneConfig(name="vit_tiny", patch=4, masked="token")
SMALL = BackboneConfig(name="timm:test_resnet")
CONVNEXT = BackboneConfig(name="timm:test_convnext")
View = tuple[Tensor, Tensor | None]


def views_of(*sides: int) -> list[View]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64), None) for side in sides]


def built(config: BackboneConfig) -> tuple[Backbone, list[tuple[int, ...]]]:
    """A backbone in float64 that notes what is given to it."""
    torch.manual_seed(0)
    backbone = build_backbone(config).double().train()
    given: list[tuple[int, ...]] = []
    backbone.register_forward_pre_hook(lambda _, arguments: given.append(tuple(arguments[0].shape)))
    return backbone, given


@pytest.mark.parametrize("config", [VIT, TOKENS, CONVNEXT], ids=lambda config: f"{config.name} {config.masked}")
def test_without_batch_norm_views_of_one_size_share_a_pass_with_the_same_result_and_gradient(
    config: BackboneConfig,
) -> None:
    backbone, given = built(config)
    views = views_of(48, 32, 48, 32, 32)
    weights = [torch.randn(3, backbone.dim, dtype=torch.float64) for _ in views]
    together = backbone.each(views)
    assert given == [(6, 3, 48, 48), (9, 3, 32, 32)]
    alone = [backbone(*view) for view in views]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad(
            sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), list(backbone.parameters()), allow_unused=True
        )
        for ys in (together, alone)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_masked_views_go_alone_for_they_may_hide_different_numbers_of_patches() -> None:
    backbone, given = built(VIT)
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    (first, _), (second, _), plain, other = views_of(16, 16, 16, 16)
    views: list[View] = [(first, order < 4), plain, (second, order < 12), other]
    together = backbone.each(views)
    assert sorted(given) == [(3, 3, 16, 16), (3, 3, 16, 16), (6, 3, 16, 16)]
    for found, view in zip(together, views, strict=True):
        torch.testing.assert_close(found, backbone(*view), rtol=1e-10, atol=1e-12)


def test_with_batch_norm_each_view_has_its_own_statistics_unless_they_are_joined() -> None:
    views = views_of(32, 32)
    separate, given = built(SMALL)
    found = separate.each(views)
    assert given == [(3, 3, 32, 32)] * 2
    alone, _ = built(SMALL)
    assert all(torch.equal(y, alone(*view)) for y, view in zip(found, views, strict=True))
    joined, given = built(SMALL)
    joined.joint = True
    found = joined.each(views)
    assert given == [(6, 3, 32, 32)]
    whole, _ = built(SMALL)
    expected = whole(torch.cat([images for images, _ in views])).split(3)
    assert all(torch.equal(y, wanted) for y, wanted in zip(found, expected, strict=True))
    assert not torch.allclose(found[0], alone(*views[0]))


def test_a_branch_projects_each_view_by_itself() -> None:
    torch.manual_seed(0)
    branch = Branch(VIT, (8, 4)).double().train()
    views = views_of(16, 16)
    for (y, z), view in zip(branch.each(views), views, strict=True):
        expected_y, expected_z = branch(*view)
        torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(z, expected_z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("joint", "passes"), [(False, 6 * 2), (True, 6)])
def test_a_run_joins_them_as_it_is_told(
    digits_dataset: Path, monkeypatch: pytest.MonkeyPatch, joint: bool, passes: int
) -> None:
    seen: list[int] = []
    forward = torch.nn.Module.__call__

    def counted(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if isinstance(module, Backbone):
            seen.append(len(args[0]))  # type: ignore[arg-type]
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    run(config_of(digits_dataset, joint_views=joint))
    assert seen == [32 * 12 // passes] * passes
