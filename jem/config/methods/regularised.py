"""Settings of the methods that keep the embedding's information by a term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jem.config.methods.base import JointSettings, MethodSettings, Traits
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
        paper="Bardes et al., 2022, arXiv 2105.04906",
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


class BarlowConfig(JointSettings):
    """Barlow Twins (Zbontar, Jing, Misra, LeCun, Deny, 2021)."""

    traits: ClassVar = Traits(
        title="Barlow Twins",
        family="regularised",
        prevents="cross-correlation matrix near the identity",
        paper="Zbontar et al., 2021, arXiv 2103.03230",
        bears=64,
    )
    name: Literal["barlow"] = "barlow"
    lam: NonNegative = Field(
        5e-3, description="lambda, weight of the correlations between dimensions; 0: they may repeat each other"
    )
    scale: PositiveFloat = Field(
        1.0, description="factor on the loss; what LARS does not adapt (biases, norms) feels it as a factor on the rate"
    )
    projector: tuple[PositiveInt, ...] = Field((2048, 2048, 2048), min_length=1, description="widths of its layers")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, accumulate = run.train.batch_size, run.train.accumulate
        if batch // accumulate < 2:
            raise ValueError(
                f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image, which has no correlation: Barlow "
                "Twins needs at least 2, better 256"
            )


class WMSEConfig(JointSettings):
    """W-MSE (Ermolov, Siarohin, Sangineto, Sebe, 2021)."""

    traits: ClassVar = Traits(
        title="W-MSE",
        family="regularised",
        prevents="whitened embeddings",
        paper="Ermolov et al., 2021, arXiv 2007.06346",
        views="many",
        bears=128,
    )
    name: Literal["wmse"] = "wmse"
    projector: tuple[PositiveInt, ...] = Field((1024, 64), min_length=1, description="widths of its layers")
    sub_batch: PositiveInt = Field(
        128, description="embeddings that are whitened together; at least twice the embedding's width is good"
    )
    partitions: PositiveInt = Field(
        1, description="random partitions of the batch into sub-batches, over which the loss is averaged"
    )
    epsilon: NonNegative = Field(
        1e-5,
        description="added to the covariance's diagonal, as a share of its mean, so that it stays definite",
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, accumulate = run.train.batch_size, run.train.accumulate
        whole, size, width = batch // accumulate, self.sub_batch, self.projector[-1]
        parts = f" in {accumulate} parts of {whole}" if accumulate > 1 else ""
        if size > whole:
            raise ValueError(
                f"method.sub_batch {size} is more than train.batch_size {batch}{parts}: there are not so many "
                "embeddings to whiten together; lower it or raise the batch"
            )
        if whole % size:
            raise ValueError(
                f"train.batch_size {batch}{parts} is no multiple of method.sub_batch {size}: some embeddings would "
                f"not be whitened; make it a multiple of {size * accumulate}"
            )
        if size <= width:
            raise ValueError(
                f"method.sub_batch {size} is not larger than the embedding's {width} dimensions: the covariance of "
                f"{size} embeddings has at most rank {size - 1} and no inverse; raise it (to {2 * width}, say), or "
                "lower the last width of method.projector"
            )
