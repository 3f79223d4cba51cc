"""The network that is kept, and what its copies follow."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from jem.config.section import Fraction, Section

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")
VITS = ("vit_tiny", "vit_small", "vit_base")
WAVEFORM = "resnet18_1d"
LIBRARIES = ("torchvision:", "timm:")


class BackboneConfig(Section):
    """The network that is kept."""

    name: str = Field(
        "resnet18",
        description="resnet18, resnet34, resnet50, resnet101, wide_resnet50_2, wide_resnet101_2, vit_tiny, vit_small, "
        "vit_base, torchvision:NAME, timm:NAME; resnet18_1d takes waveforms",
    )
    stem: Literal["imagenet", "cifar", "stride2"] = Field(
        "imagenet",
        description="of a ResNet; imagenet: 7x7 stride 2, max-pool; cifar: 3x3 stride 1, stride2: 3x3 stride 2, "
        "no max-pool",
    )
    zero_init: bool = Field(True, description="zero the last batch norm's weight of each residual block of a ResNet")
    width: PositiveInt = Field(1, description="factor on all channels of a ResNet (2: the papers' ResNet-50 x2)")
    patch: PositiveInt = Field(
        16, description="side of a ViT's patch in pixels: 4 for 32 px, 8 for 64 to 96, 16 for 224"
    )
    pool: Literal["cls", "mean"] = Field(
        "cls", description="a ViT's representation: its class token, or the patches' mean"
    )
    masked: Literal["drop", "token"] = Field(
        "drop", description="what a ViT does with masked patches: leave them out, or put a learned token in their place"
    )
    drop_path: Fraction = Field(0.0, description="stochastic depth of a ViT: probability for its last block")

    @property
    def is_resnet(self) -> bool:
        """Whether `stem`, `zero_init` and `width` mean something."""
        return self.name in RESNETS or self.name == WAVEFORM

    @property
    def is_vit(self) -> bool:
        """Whether it has patches, which can be masked."""
        return self.name in VITS

    @property
    def in_words(self) -> str:
        """Name and what else tells such networks apart, in a few words."""
        wide = f" x{self.width}" if self.width > 1 else ""
        if self.name in RESNETS:
            return f"{self.name}{wide}, {self.stem} stem"
        return f"{self.name}, patch {self.patch}" if self.is_vit else f"{self.name}{wide}"

    @model_validator(mode="after")
    def _known(self) -> BackboneConfig:
        if not (self.name in (*RESNETS, *VITS, WAVEFORM) or self.name.startswith(LIBRARIES)):
            known = (*RESNETS, *VITS, WAVEFORM)
            near = difflib.get_close_matches(self.name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"take {', '.join(known)}, torchvision:NAME or timm:NAME"
            raise ValueError(f"name {self.name!r} is not a backbone: {hint}")
        fields = type(self).model_fields
        settings = {"stem": RESNETS, "zero_init": (*RESNETS, WAVEFORM), "width": (*RESNETS, WAVEFORM)}
        settings |= dict.fromkeys(("patch", "pool", "masked", "drop_path"), VITS)
        for setting, names in settings.items():
            if self.name not in names and getattr(self, setting) != fields[setting].default:
                raise ValueError(f"{setting} is for {', '.join(names)}: leave it out for {self.name}")
        return self


class MomentumConfig(Section):
    """Exponential moving average of the online network: target = tau target + (1 - tau) online, after each step."""

    tau: Fraction = Field(0.99, description="decay at the beginning; 0 copies the online network, 1 never changes")
    final: Fraction = Field(1.0, description="decay at the end")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="from tau to final; constant: tau")
    over: Fraction = Field(1.0, description="share of the training after which the decay is final")
