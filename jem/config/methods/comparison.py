"""Settings of what joint embedding methods are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jem.config.methods.base import JointSettings, MethodSettings, Traits
from jem.config.section import Fraction, NonNegative

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


class SupervisedConfig(MethodSettings):
    """Cross entropy on the labels, for comparison; one view is enough."""

    traits: ClassVar = Traits(
        title="Supervised",
        family="comparison",
        prevents="labels",
        paper="He et al., 2016, arXiv 1512.03385",
        needs=("labels",),
    )
    name: Literal["supervised"] = "supervised"
    label_smoothing: Fraction = 0.0

    def check(self, run: PretrainConfig) -> None:
        """Any number of views will do."""


class DenoisingConfig(MethodSettings):
    """Denoising autoencoder (Vincent, Larochelle, Bengio, Manzagol, 2008)."""

    traits: ClassVar = Traits(
        title="Denoising autoencoder",
        family="comparison",
        prevents="reconstruction of the pixels",
        paper="Vincent et al., 2008, ICML",
        views="one",
    )
    name: Literal["denoising"] = "denoising"
    sigma: NonNegative = Field(
        0.5, description="standard deviation of the Gaussian noise, in that of the normalised pixels; 0: none"
    )
    mask: Fraction = Field(0.25, description="share of the pixels that are set to the mean colour; 0: none")
    decoder: tuple[PositiveInt, ...] = Field(
        (256, 128, 64), min_length=1, description="channels of its stages, from 4 x 4 up to the view's size"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        if not self.sigma and not self.mask:
            raise ValueError(
                "method.sigma and method.mask are both 0, so there is no noise to remove: raise one of them"
            )
        if self.mask == 1:
            raise ValueError("method.mask 1 leaves no pixel to see: lower it")


class JigsawConfig(MethodSettings):
    """Jigsaw puzzles (Noroozi, Favaro, 2016)."""

    traits: ClassVar = Traits(
        title="Jigsaw puzzle",
        family="comparison",
        prevents="a pretext task: the order of 9 patches",
        paper="Noroozi and Favaro, 2016, arXiv 1603.09246",
        views="one",
    )
    name: Literal["jigsaw"] = "jigsaw"
    permutations: int = Field(
        64, ge=2, le=2000, description="orders of the patches to tell apart, chosen far from each other"
    )
    patch: PositiveInt = Field(64, description="side in pixels to which the patches are resized")
    normalise: bool = Field(
        True,
        description="give each patch mean 0 and deviation 1 per channel: its brightness and colour tell its place",
    )
    classifier: tuple[PositiveInt, ...] = Field((1024,), description="widths of its hidden layers")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        view, backbone = run.augment.views[0], run.backbone
        if view.size < 9:
            raise ValueError(f"augment.views has {view.size} pixels, too few for 3 x 3 patches: set size to 9 or more")
        if view.mask is not None:
            raise ValueError("augment.views has a mask, and the jigsaw puzzle takes the view apart: leave it out")
        if backbone.is_vit and self.patch % backbone.patch:
            raise ValueError(
                f"method.patch {self.patch} is not a multiple of backbone.patch {backbone.patch}, which a ViT needs: "
                "change one of them"
            )


class RotationConfig(MethodSettings):
    """Rotation prediction (Gidaris, Singh, Komodakis, 2018)."""

    traits: ClassVar = Traits(
        title="Rotation prediction",
        family="comparison",
        prevents="a pretext task: the rotation by 0, 90, 180 or 270 degrees",
        paper="Gidaris et al., 2018, arXiv 1803.07728",
        views="one",
    )
    name: Literal["rotation"] = "rotation"
    rotations: Literal["all", "random"] = Field(
        "all", description="all four of each image, as the paper's (4 times the work), or a random one"
    )


class TripletConfig(JointSettings):
    """Triplet loss (Wang, Gupta, 2015; Schroff, Kalenichenko, Philbin, 2015)."""

    traits: ClassVar = Traits(
        title="Triplet loss",
        family="comparison",
        prevents="negatives, a margin further away than the positive",
        paper="Wang and Gupta, 2015, arXiv 1505.00687; Schroff et al., 2015, arXiv 1503.03832",
        needs=("negatives",),
    )
    name: Literal["triplet"] = "triplet"
    projector: tuple[PositiveInt, ...] = Field((1024, 128), min_length=1, description="widths of its layers")
    distance: Literal["cosine", "euclidean"] = Field(
        "cosine", description="cosine: 1 - cos; euclidean: squared distance of the embeddings as they are"
    )
    margin: PositiveFloat = Field(0.5, description="how much further than the positive a negative must be")
    negatives: Literal["all", "hardest"] = Field(
        "all", description="of the global batch: mean over all other images' views, or the nearest one alone"
    )

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        _needs_negatives(self, run)


class MarginConfig(JointSettings):
    """Contrastive loss with a margin (Hadsell, Chopra, LeCun, 2006)."""

    traits: ClassVar = Traits(
        title="Margin loss",
        family="comparison",
        prevents="negatives, pushed a margin away",
        paper="Hadsell et al., 2006, CVPR",
        needs=("negatives",),
    )
    name: Literal["margin"] = "margin"
    projector: tuple[PositiveInt, ...] = Field((1024, 128), min_length=1, description="widths of its layers")
    margin: PositiveFloat = Field(1.0, description="m, the distance from which a negative costs nothing")
    normalise: bool = Field(True, description="embeddings of length 1; false: as they are, as the paper's")

    def check(self, run: PretrainConfig) -> None:
        """See the base class."""
        super().check(run)
        _needs_negatives(self, run)
        if self.normalise and self.margin > 2:
            raise ValueError(
                f"method.margin {self.margin:g} cannot be reached: embeddings of length 1 are at most 2 apart; lower "
                "it, or set method.normalise to false"
            )


def _needs_negatives(settings: MethodSettings, run: PretrainConfig) -> None:
    batch, accumulate = run.train.batch_size, run.train.accumulate
    if batch // accumulate < 2:
        raise ValueError(
            f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image and no negative: {settings.traits.title} "
            "needs at least 2, better 256"
        )
