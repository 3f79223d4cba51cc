"""Settings of the methods that push the embeddings of different images apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jem.config.methods.base import JointSettings, Traits
from jem.config.networks import MomentumConfig
from jem.config.section import Fraction

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


def needs_negatives(run: PretrainConfig, title: str) -> None:
    """Refuse forward passes of one image.

    Raises:
        ValueError: no image is left to contrast with.
    """
    batch, accumulate = run.train.batch_size, run.train.accumulate
    if batch // accumulate < 2:
        raise ValueError(
            f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image, and {title} contrasts it with the "
            "others: it needs at least 2, better 256"
        )


class SimCLRConfig(JointSettings):
    """SimCLR (Chen, Kornblith, Norouzi, Hinton, 2020)."""

    traits: ClassVar = Traits(
        title="SimCLR",
        family="contrastive",
        prevents="negatives from the batch",
        paper="Chen et al., 2020, arXiv 2002.05709",
        needs=("negatives",),
        bears=128,
    )
    name: Literal["simclr"] = "simclr"
    projector: tuple[PositiveInt, ...] = Field((2048, 256), min_length=1, description="widths of its layers")
    temperature: PositiveFloat = Field(0.2, description="of the similarities; 1 / beta")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        needs_negatives(run, self.traits.title)


class MoCoConfig(JointSettings):
    """MoCo v1 (He et al., 2020) and v2 (Chen, Fan, Girshick, He, 2020), and the memory bank (`momentum: null`)."""

    traits: ClassVar = Traits(
        title="MoCo",
        family="contrastive",
        prevents="negatives from a queue",
        paper="He et al., 2020, arXiv 1911.05722",
        needs=("negatives", "momentum"),
        bears=32,
    )
    name: Literal["moco"] = "moco"
    projector: tuple[PositiveInt, ...] = Field(
        (2048, 256), min_length=1, description="widths of its layers; one layer is v1's linear head, such as [128]"
    )
    queue: PositiveInt = Field(4096, description="keys of earlier batches that are kept as negatives")
    temperature: PositiveFloat = Field(0.2, description="of the similarities; v1: 0.07")
    momentum: MomentumConfig | None = Field(
        MomentumConfig(final=0.999),
        description="of the key network; null: keys come from the online network, without gradient (a memory bank)",
    )
    symmetric: bool = Field(False, description="each view is query once and key once; the papers: the first is query")
    norm_groups: PositiveInt = Field(
        8, description="groups of shuffled keys whose batch norm statistics are separate; 1: no shuffling"
    )

    @property
    def rows(self) -> int:
        """Keys that one image puts into the queue."""
        return 2 if self.symmetric else 1

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, accumulate, workers = run.train.batch_size, run.train.accumulate, run.cluster.workers
        keys = batch * self.rows
        if self.queue % keys:
            raise ValueError(
                f"method.queue {self.queue} is not a multiple of {keys}, the keys that a step puts in "
                f"(train.batch_size {batch}{' x 2, symmetric' if self.symmetric else ''}): the oldest are replaced by "
                f"whole batches; make it {(self.queue // keys + 1) * keys}"
            )
        if self.norm_groups == 1:
            return
        if self.norm_groups % workers:
            raise ValueError(
                f"method.norm_groups {self.norm_groups} does not divide among cluster.workers {workers}: each worker "
                f"runs whole groups; make it a multiple of {workers}, or 1 for no shuffling"
            )
        part = batch // accumulate
        if part % self.norm_groups or part // self.norm_groups < 2:
            raise ValueError(
                f"method.norm_groups {self.norm_groups} does not divide train.batch_size {batch} in {accumulate} "
                "part(s) into equal groups of at least 2 images, whose statistics batch norm takes: lower it, or raise "
                "the batch"
            )


class MoCoV3Config(JointSettings):
    """MoCo v3 (Chen, Xie, He, 2021)."""

    traits: ClassVar = Traits(
        title="MoCo v3",
        family="contrastive",
        prevents="negatives from the batch",
        paper="Chen et al., 2021, arXiv 2104.02057",
        needs=("negatives", "momentum", "predictor"),
        bears=128,
    )
    name: Literal["mocov3"] = "mocov3"
    projector: tuple[PositiveInt, ...] = Field(
        (4096, 256), min_length=1, description="widths of its layers; the paper's for a ViT: [4096, 4096, 256]"
    )
    predictor: tuple[PositiveInt, ...] = Field(
        (4096,), description="widths of its hidden layers; its output is as wide as the projector's"
    )
    temperature: PositiveFloat = Field(0.2, description="of the similarities; tau in the paper")
    momentum: MomentumConfig = Field(MomentumConfig(), description="of the key network")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        needs_negatives(run, self.traits.title)


class PIRLConfig(JointSettings):
    """PIRL (Misra, van der Maaten, 2020): the second view is taken apart into a jigsaw of 9 patches."""

    traits: ClassVar = Traits(
        title="PIRL",
        family="contrastive",
        prevents="negatives from a bank of all images",
        paper="Misra and van der Maaten, 2020, arXiv 1912.01991",
        needs=("negatives", "ids"),
    )
    name: Literal["pirl"] = "pirl"
    projector: tuple[PositiveInt, ...] = Field(
        (128,), min_length=1, description="widths of the layers of either head; the paper's are linear"
    )
    norm: bool = Field(
        False,
        description="batch norm at the end of either head, which keeps the embeddings' mean at 0: the rows of the bank "
        "are an epoch old, and early in a training the mean moves away from them",
    )
    patch_size: PositiveInt = Field(64, description="side in pixels of a patch as the backbone gets it")
    negatives: PositiveInt = Field(4096, description="rows of the bank, drawn anew for each batch; the paper: 32000")
    temperature: PositiveFloat = Field(0.07, description="of the similarities")
    lam: Fraction = Field(0.5, description="lambda, weight of the jigsaw's loss; 1 - lambda is the image's")
    bank_momentum: Fraction = Field(0.5, description="what a row of the bank keeps of itself when its image comes by")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        view, backbone = run.augment.views[-1], run.backbone
        if view.size < 9:
            raise ValueError(
                f"the second of augment.views has {view.size} pixels, too few for PIRL's 3 x 3 patches: raise its size"
            )
        if view.mask is not None:
            raise ValueError(
                "the second of augment.views has a mask, and PIRL takes that view apart: give a mask to the first only"
            )
        if backbone.is_vit and self.patch_size % backbone.patch:
            raise ValueError(
                f"method.patch_size {self.patch_size} is not a multiple of backbone.patch {backbone.patch}, which a "
                "ViT needs: change one of them"
            )
