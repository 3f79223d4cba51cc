"""Settings of the methods that keep the embedding's information by a term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from jem.config.methods.base import MethodSettings, Traits
from jem.config.networks import BackboneConfig
from jem.config.section import NonNegative

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


class VICRegConfig(MethodSettings):
    """VICReg (Bardes, Ponce, LeCun, 2022)."""

    traits: ClassVar = Traits(
        title="VICReg",
        family="regularised",
        prevents="variance and covariance terms",
        paper="Bardes, Ponce, LeCun, 2022, arXiv 2105.04906",
        scaled=True,
        bears=64,
    )
    name: Literal["vicreg"] = "vicreg"
    lam: NonNegative = Field(25.0, description="lambda, weight of the invariance term")
    mu: NonNegative = Field(25.0, description="mu, weight of the variance term; 0 collapses")
    nu: NonNegative = Field(1.0, description="nu, weight of the covariance term")
    hinge: Literal["std", "variance"] = Field(
        "std", description="what the variance term holds at 1; variance is the paper's ablation, and collapses"
    )
    expander: tuple[PositiveInt, ...] = Field((2048, 2048, 2048), min_length=1, description="widths of its layers")
    branches: Literal["shared", "separate"] | tuple[BackboneConfig, BackboneConfig] = Field(
        "shared", description="the views' networks: one, two alike, or two of the given backbones (the first is kept)"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, accumulate = run.train.batch_size, run.train.accumulate
        if batch // accumulate < 2:
            raise ValueError(
                f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image, which has no variance: VICReg "
                "needs at least 2, better 256"
            )
