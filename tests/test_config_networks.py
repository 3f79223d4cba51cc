"""A run's views must fit its backbones."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jem.config import BackboneConfig, PretrainConfig

VIT: dict[str, Any] = {"name": "vit_tiny", "patch": 4}
MASKED: dict[str, Any] = {"size": 32, "mask": {"patch": 4}}
PLAIN: dict[str, Any] = {"size": 32}


def run(backbone: dict[str, Any], *views: dict[str, Any], branches: object = "shared") -> PretrainConfig:
    values = {
        "data": "images",
        "backbone": backbone,
        "augment": {"views": views or [PLAIN, PLAIN]},
        "method": {"name": "vicreg", "branches": branches},
    }
    return PretrainConfig.model_validate(values)


@pytest.mark.parametrize("views", [(MASKED, MASKED), (MASKED, PLAIN), (PLAIN, PLAIN)])
def test_views_of_a_vit_may_be_masked(views: tuple[dict[str, Any], ...]) -> None:
    assert [view.mask is not None for view in run(VIT, *views).augment.views] == [view is MASKED for view in views]


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "torchvision:vit_b_16", "timm:vit_tiny_patch16_224"])
def test_masks_for_other_backbones_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"masks need a ViT: {name} has no patches that .*set backbone.name to"):
        run({"name": name}, MASKED, PLAIN)


@pytest.mark.parametrize(
    ("backbone", "views", "message"),
    [
        ({**VIT, "patch": 8}, [MASKED, PLAIN], "patches of 4 pixels, and backbone patches of 8: set mask.patch to 8"),
        ({"name": "vit_tiny"}, [{"size": 40}, PLAIN], r"40 pixels .* patches of 16 \(backbone.patch\): set .* to 4"),
        ({"name": "vit_tiny"}, [{"size": 64}, {"size": 72}], "72 pixels .* set backbone.patch to 8"),
        (VIT, [PLAIN, {"size": 30}], "30 pixels does not divide into patches of 4"),
        ({**VIT, "masked": "token"}, [PLAIN, PLAIN], "backbone.masked is token, but none of its views has a mask"),
        ({"name": "resnet18_1d"}, [PLAIN, PLAIN], "resnet18_1d takes waveforms, .* data sets hold images: use it from"),
    ],
)
def test_views_that_the_backbone_cannot_take_are_refused(
    backbone: dict[str, Any], views: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        run(backbone, *views)


def test_each_view_must_fit_the_branch_that_it_goes_to() -> None:
    mixed = [{"name": "resnet18"}, VIT]
    run({}, PLAIN, MASKED, branches=mixed)
    with pytest.raises(ValidationError, match=r"masks need a ViT: resnet18 .* set method.branches.0.name"):
        run({}, MASKED, PLAIN, branches=mixed)
    with pytest.raises(ValidationError, match=r"method.branches.1 patches of 8: set mask.patch to 8"):
        run({}, PLAIN, MASKED, branches=[{"name": "resnet18"}, {**VIT, "patch": 8}])
    with pytest.raises(ValidationError, match=r"patches of 16 \(method.branches.1.patch\)"):
        run({}, PLAIN, {"size": 36}, branches=[{"name": "resnet18"}, {"name": "vit_tiny"}])
    with pytest.raises(ValidationError, match=r"method.branches.1: resnet18_1d takes waveforms"):
        run({}, branches=[{"name": "resnet18"}, {"name": "resnet18_1d"}])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "resnet18, imagenet stem"),
        ({"name": "resnet50", "width": 2, "stem": "cifar"}, "resnet50 x2, cifar stem"),
        ({"name": "vit_small", "patch": 8}, "vit_small, patch 8"),
        ({"name": "resnet18_1d"}, "resnet18_1d"),
        ({"name": "timm:resnet18"}, "timm:resnet18"),
    ],
)
def test_a_backbone_is_described_by_what_it_has(settings: dict[str, Any], words: str) -> None:
    assert BackboneConfig(**settings).in_words == words
