"""Two branches of VICReg may be different networks that take different kinds of input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, VICRegConfig
from jem.data.plan import Plan, Position
from jem.methods import build_method
from jem.methods.vicreg import VICReg
from jem.models.backbones import ResNet
from jem.models.vit import ViT
from jem.models.waveform import WaveformResNet
from jem.train.loop import fit

BATCH, STEPS, SIDE, LENGTH = 32, 16, 16, 256
RESNET, WAVEFORM = BackboneConfig(stem="stride2"), BackboneConfig(name="resnet18_1d")
VIT = BackboneConfig(name="vit_tiny", patch=8)


def image(colour: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return colour[:, :, None, None] + 0.3 * torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)


def waveform(strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    phase = 6.28 * torch.rand(BATCH, 3, 1, generator=generator)
    tones = torch.sin(torch.arange(LENGTH) * torch.tensor([0.1, 0.3, 0.9])[:, None] + phase)
    return (strength.sigmoid()[:, :, None] * tones).sum(dim=1, keepdim=True)


def views(kind: str, step: int) -> Views:
    """Three numbers that both views have in common: an image's colour, and another's or the strength of three tones."""
    generator = torch.Generator().manual_seed(step)
    common = torch.randn(BATCH, 3, generator=generator)
    second = (waveform if kind == "waveform" else image)(common, generator)
    masks = [None, torch.rand(BATCH, 4, generator=generator).argsort(dim=1) < 2] if kind == "masked" else None
    ids = torch.arange(BATCH)
    return Views([image(common, generator), second], ids, torch.full_like(ids, -1), masks)


class Told:
    """The loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.losses += [values["train/loss"]] if "train/loss" in values else []

    def progress(self, images: int, info: dict[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "second", "network"),
    [("waveform", WAVEFORM, WaveformResNet), ("image", VIT, ViT), ("masked", VIT, ViT)],
)
def test_a_resnet_of_images_learns_what_it_has_in_common_with_another_network(
    kind: str, second: BackboneConfig, network: type[torch.nn.Module]
) -> None:
    torch.manual_seed(0)
    method = build_method(VICRegConfig(expander=(32, 16), branches=(RESNET, second)), RESNET)
    assert isinstance(method, VICReg)
    assert isinstance(method.backbone, ResNet)
    assert isinstance(method.branches[1].backbone, network)
    before = {name: value.clone() for name, value in method.named_parameters()}
    config = PretrainConfig.model_validate(
        {
            "data": "none",
            "method": {"name": "vicreg"},
            "optimizer": {"name": "adamw", "lr": 0.008},
            "schedule": {"warmup_epochs": 0},
            "train": {"epochs": STEPS, "batch_size": BATCH, "log_every": 1},
            "evaluation": {"online": None},
        }
    )

    def source(start: Position) -> Iterator[Views]:
        return (views(kind, step) for step in range(STEPS))

    told = Told()
    plan = Plan((BATCH,), 0, BATCH, 1)
    fit(config, method, source, plan, told, lambda *_: None, device=torch.device("cpu"))
    assert len(told.losses) == STEPS
    assert sum(told.losses[-4:]) < 0.9 * sum(told.losses[:4])
    with torch.no_grad():
        made = [branch(*view)[1] for branch, view in zip(method.branches, views(kind, STEPS), strict=True)]
    z1, z2 = ((z - z.mean(dim=0)) / z.std(dim=0) for z in made)
    assert (z1 * z2).mean() > 0.3  # chance is 0, give or take 0.1
    assert [name for name, value in method.named_parameters() if torch.equal(value, before[name])] == []
