"""Settings of the methods in which one network learns what another, made of its own weights, says."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from jem.config.methods.base import JointSettings, Traits
from jem.config.networks import MomentumConfig
from jem.config.section import Fraction, NonNegative

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


def _two_images(run: PretrainConfig, title: str) -> None:
    batch, accumulate = run.train.batch_size, run.train.accumulate
    if batch // accumulate < 2:
        raise ValueError(
            f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image, which a batch norm cannot take: {title} "
            "needs at least 2, better 256"
        )


class BYOLConfig(JointSettings):
    """BYOL (Grill et al., 2020)."""

    traits: ClassVar = Traits(
        title="BYOL",
        family="distillation",
        prevents="predictor and momentum target",
        paper="Grill et al., 2020, arXiv 2006.07733",
        needs=("momentum", "predictor"),
    )
    name: Literal["byol"] = "byol"
    projector: tuple[PositiveInt, ...] = Field((4096, 256), min_length=1, description="widths of its layers")
    predictor: tuple[PositiveInt, ...] | None = Field(
        (4096,),
        description="widths of its hidden layers (its output is as wide as the projector's); null for no "
        "predictor, which collapses",
    )
    norm: bool = Field(True, description="batch norm in projector and predictor")
    stop_gradient: bool = Field(
        True,
        description="false: the target is the online network itself and is trained towards the prediction; "
        "there is no momentum network then, and it collapses",
    )
    target: Literal["momentum", "scaled"] = Field(
        "momentum", description="its weights: a moving average of the online ones, or those times `scale`"
    )
    momentum: MomentumConfig = Field(MomentumConfig(), description="of target: momentum")
    scale: PositiveFloat | None = Field(None, description="factor on the weights, of target: scaled")

    @model_validator(mode="after")
    def _fits(self) -> BYOLConfig:
        if self.target == "scaled" and self.scale is None:
            raise ValueError("target: scaled needs scale: the factor on the online network's weights")
        if self.target == "momentum" and self.scale is not None:
            raise ValueError("scale is for target: scaled: leave it out, or set target")
        if not self.stop_gradient and self.target == "scaled":
            raise ValueError("stop_gradient: false has no target network: leave out target and scale")
        return self

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        _two_images(run, "BYOL")


class SimSiamConfig(JointSettings):
    """SimSiam (Chen, He, 2021)."""

    traits: ClassVar = Traits(
        title="SimSiam",
        family="distillation",
        prevents="predictor and stop-gradient",
        paper="Chen and He, 2021, arXiv 2011.10566",
        needs=("predictor",),
    )
    name: Literal["simsiam"] = "simsiam"
    projector: tuple[PositiveInt, ...] = Field((2048, 2048, 2048), min_length=1, description="widths of its layers")
    predictor: PositiveInt | None = Field(
        512, description="width of its hidden layer; null for no predictor, which collapses"
    )
    norm: bool = Field(True, description="batch norm in projector and predictor")
    stop_gradient: bool = Field(True, description="false: both branches are trained towards each other; it collapses")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        _two_images(run, "SimSiam")


class DirectPredConfig(JointSettings):
    """DirectPred (Tian, Chen, Ganguli, 2021)."""

    traits: ClassVar = Traits(
        title="DirectPred",
        family="distillation",
        prevents="predictor that is set from the embeddings' correlation",
        paper="Tian et al., 2021, arXiv 2102.06810",
        needs=("momentum", "predictor"),
    )
    name: Literal["directpred"] = "directpred"
    projector: tuple[PositiveInt, ...] = Field((4096, 256), min_length=1, description="widths of its layers")
    norm: bool = Field(True, description="batch norm in the projector")
    rho: Fraction = Field(0.3, description="share of the correlation matrix that is kept; 1 - rho is the new batch's")
    eps: NonNegative = Field(0.01, description="added to the predictor's eigenvalues, of which the largest is 1")
    every: PositiveInt = Field(1, description="steps between new predictors")
    momentum: MomentumConfig | None = Field(
        MomentumConfig(), description="of the target network; null: the target is the online network, as in SimSiam"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        _two_images(run, "DirectPred")


class DINOConfig(JointSettings):
    """DINO (Caron et al., 2021)."""

    traits: ClassVar = Traits(
        title="DINO",
        family="distillation",
        prevents="centring and sharpening of the teacher's output",
        paper="Caron et al., 2021, arXiv 2104.14294",
        needs=("momentum", "multi-crop"),
        views="many",
    )
    name: Literal["dino"] = "dino"
    projector: tuple[PositiveInt, ...] = Field(
        (2048, 2048, 256), min_length=1, description="widths of its layers, the bottleneck last"
    )
    norm: bool = Field(False, description="batch norm in the projector")
    prototypes: PositiveInt = Field(65536, ge=2, description="K, the width of the output")
    temperature: PositiveFloat = Field(0.1, description="of the student")
    teacher_temperature: PositiveFloat = Field(
        0.07, description="of the teacher after the warm-up; the student's (with the next one): no sharpening"
    )
    first_teacher_temperature: PositiveFloat = Field(0.04, description="of the teacher in the first epoch")
    warmup_epochs: NonNegativeInt = Field(30, description="epochs in which the teacher's temperature rises")
    centring: bool = Field(True, description="subtract the centre, a moving mean of the teacher's output")
    centre_decay: Fraction = Field(0.9, description="of the centre, after each step")
    freeze_epochs: NonNegativeInt = Field(1, description="epochs in which the last layer is not trained")
    momentum: MomentumConfig = Field(MomentumConfig(tau=0.996), description="of the teacher")
    encoder: Literal["teacher", "student"] = Field("teacher", description="whose backbone is kept")


class Data2vecConfig(JointSettings):
    """data2vec for images (Baevski et al., 2022)."""

    traits: ClassVar = Traits(
        title="data2vec",
        family="distillation",
        prevents="momentum teacher and normalised targets",
        paper="Baevski et al., 2022, arXiv 2202.03555",
        needs=("momentum", "ViT"),
        views="one",
    )
    name: Literal["data2vec"] = "data2vec"
    top: PositiveInt = Field(6, le=12, description="K, the last blocks of the teacher whose mean is the target")
    loss: Literal["smooth_l1", "l2"] = Field("smooth_l1", description="between prediction and target")
    beta: PositiveFloat = Field(2.0, description="where smooth_l1 turns from squared to absolute")
    momentum: MomentumConfig = Field(
        MomentumConfig(tau=0.999, final=0.9999, schedule="linear", over=0.3), description="of the teacher"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        if not run.backbone.is_vit:
            raise ValueError(
                f"data2vec needs a ViT, whose patches can be masked, not {run.backbone.name}: set backbone.name to "
                "vit_tiny, vit_small or vit_base"
            )
        if run.augment.views[0].mask is None:
            raise ValueError("data2vec predicts what a mask hides: give the view in augment.views a mask")
        if run.backbone.masked != "token":
            raise ValueError(
                "data2vec predicts the masked patches, so they must not be dropped: set backbone.masked to token"
            )
