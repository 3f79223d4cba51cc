"""Settings of the methods that assign views, images or patches to clusters and predict the assignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from jem.config.methods.base import JointSettings, Traits
from jem.config.networks import RESNETS, MomentumConfig

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


class SwAVConfig(JointSettings):
    """SwAV (Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, 2020)."""

    traits: ClassVar = Traits(
        title="SwAV",
        family="clustering",
        prevents="equal partition (Sinkhorn-Knopp)",
        paper="Caron et al., 2020, arXiv 2006.09882",
        needs=("clusters", "multi-crop"),
        views="many",
        bears=256,
    )
    name: Literal["swav"] = "swav"
    projector: tuple[PositiveInt, ...] = Field((2048, 128), min_length=1, description="widths of its layers")
    prototypes: PositiveInt = Field(3000, description="K, how many")
    temperature: PositiveFloat = Field(0.1, description="of the prediction's softmax")
    epsilon: PositiveFloat = Field(0.05, description="entropy of the codes; large makes them uniform")
    iterations: NonNegativeInt = Field(
        3, description="of Sinkhorn-Knopp; 0 takes the codes from a softmax, which collapses"
    )
    queue: NonNegativeInt = Field(
        0, description="embeddings of earlier batches that join Sinkhorn-Knopp, per global view; 0: none"
    )
    queue_from_epoch: NonNegativeInt = Field(0, description="epoch, from 0, in which the queue joins")
    freeze_epochs: NonNegativeInt = Field(1, description="epochs at the beginning in which the prototypes stay")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, part = run.train.batch_size, run.train.batch_size // run.train.accumulate
        if self.queue % batch:
            raise ValueError(
                f"method.queue {self.queue} is no multiple of train.batch_size {batch}, which is put in at a time: "
                f"take {-(-self.queue // batch) * batch}"
            )
        if self.queue_from_epoch and not self.queue:
            raise ValueError("method.queue_from_epoch is for a queue, and method.queue is 0: set it or leave both out")
        if self.prototypes > part + self.queue:
            enough = -(-(self.prototypes - part) // batch) * batch
            raise ValueError(
                f"method.prototypes {self.prototypes} cannot be shared out equally among {part} images in a batch "
                f"and {self.queue} in method.queue: some would get none; raise method.queue to {enough}, or lower "
                "method.prototypes"
            )


class DeepClusterConfig(JointSettings):
    """DeepCluster v2 (Caron et al., 2020) and the original (Caron, Bojanowski, Joulin, Douze, 2018)."""

    traits: ClassVar = Traits(
        title="DeepCluster v2",
        family="clustering",
        prevents="k-means over the whole data set",
        paper="Caron et al., 2020, arXiv 2006.09882; Caron et al., 2018, arXiv 1807.05520",
        needs=("clusters", "ids", "multi-crop"),
        views="many",
    )
    name: Literal["deepcluster"] = "deepcluster"
    projector: tuple[PositiveInt, ...] = Field((2048, 128), min_length=1, description="widths of its layers")
    prototypes: tuple[PositiveInt, ...] = Field(
        (3000, 3000, 3000), min_length=1, description="clusters of each head, a k-means of its own"
    )
    iterations: PositiveInt = Field(10, description="of k-means, at the beginning of each epoch")
    temperature: PositiveFloat = Field(0.1, description="of the prediction's softmax (alternation: v2)")
    alternation: Literal["v2", "original"] = Field(
        "v2", description="v2: the centroids are the prototypes; original: a linear classifier, reset in each epoch"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        if run.train.epochs < 2:
            raise ValueError(
                "train.epochs 1 leaves nothing to learn: DeepCluster's first epoch only embeds the images; set 2 or "
                "more"
            )
        if run.limit is not None and run.limit < max(self.prototypes):
            raise ValueError(
                f"method.prototypes {max(self.prototypes)} are more than the {run.limit} images of limit: k-means "
                "needs an image for each; lower prototypes"
            )
        if self.alternation == "original" and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError("method.temperature is for alternation v2: leave it out with the original's classifier")


class OBoWConfig(JointSettings):
    """OBoW (Gidaris, Bursuc, Puy, Komodakis, Cord, Perez, 2021)."""

    traits: ClassVar = Traits(
        title="OBoW",
        family="clustering",
        prevents="visual words of a momentum teacher",
        paper="Gidaris et al., 2021, arXiv 2012.11552",
        needs=("clusters", "momentum", "multi-crop"),
        views="many",
    )
    name: Literal["obow"] = "obow"
    words: PositiveInt = Field(8192, description="visual words in the vocabulary of each of the two levels")
    delta: PositiveFloat = Field(
        1 / 15, description="temperature of the soft assignment, as a share of the mean distance to the closest word"
    )
    kappa: PositiveFloat = Field(8.0, description="length of the generated weights")
    generator: PositiveInt | None = Field(
        None, description="hidden width of the weights' generator; default: twice the representation's"
    )
    momentum: MomentumConfig = Field(MomentumConfig(tau=0.99), description="decay of the teacher")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        batch, name = run.train.batch_size, run.backbone.name
        if name not in RESNETS:
            raise ValueError(
                f"backbone.name {name} has no feature maps of two stages, from which OBoW's words are made: take one "
                f"of {', '.join(RESNETS)}"
            )
        if self.words % batch:
            raise ValueError(
                f"method.words {self.words} is no multiple of train.batch_size {batch}, of which each image gives one "
                f"word in a step: take {-(-self.words // batch) * batch}"
            )
