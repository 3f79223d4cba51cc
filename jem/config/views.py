"""The stream, and the views that are made of its images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jem.config.section import Fraction, NonNegative, Section

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def indivisible(size: int, name: str, patch: int) -> str:
    """What is wrong with a view of `size` pixels for patches of `patch`, which the key `name` sets."""
    usual = (4, 8) if size < 64 else (8, 16, 4) if size < 128 else (16, 14, 8)
    fits = next((side for side in usual if size % side == 0), None)
    remedy = f"set {name} to {fits}, or" if fits else "set"
    return (
        f"a view of {size} pixels does not divide into patches of {patch} ({name}): {remedy} the view's size to a "
        f"multiple of {patch}"
    )


class StreamConfig(Section):
    """From Parquet shards to uint8 batches."""

    canvas: PositiveInt = Field(256, description="side S of the decoded square image, in pixels")
    window: PositiveInt = Field(4, description="row groups that are read together and shuffled among each other")
    remainder: Literal["drop", "carry"] = Field(
        "drop", description="images that do not fill the epoch's last global batch: drop them, or carry them over"
    )
    decode_tasks: PositiveInt | None = Field(
        None, description="decode tasks at a time per train worker; default: what the cluster's CPUs allow"
    )
    decode_cpus: PositiveFloat = Field(0.25, description="CPUs that one decode task reserves")
    prefetch: PositiveInt = Field(2, description="batches held ready before the step")
    cache: PositiveFloat | None = Field(
        None,
        description="keep decoded images in every node's object store, at most so many GB, to decode each once and not "
        "once an epoch; refused if they do not fit; null for none",
    )
    pixel_limit: PositiveInt = Field(178_956_970, description="larger images are refused (decompression bombs)")
    max_lost: Fraction = Field(
        0.001,
        description="share of the images that may become unreadable while training, each replaced by another; 0: stop "
        "at the first",
    )


class JitterConfig(Section):
    """Colour jitter, in torchvision's terms."""

    p: Fraction = Field(0.8, description="probability")
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class BlurConfig(Section):
    """Gaussian blur."""

    p: Fraction = Field(0.5, description="probability")
    sigma: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.1, 2.0), description="range of the standard deviation, pixels"
    )
    kernel: PositiveInt = Field(23, description="kernel size in pixels, odd")

    @model_validator(mode="after")
    def _odd(self) -> BlurConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}")
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma must be a range from low to high, not {self.sigma}")
        return self


class MaskConfig(Section):
    """Patches of a view that are hidden: the same number in every image, others in each."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of the patches that is hidden")
    kind: Literal["random", "block"] = Field(
        "random", description="random: any patches, as MAE; block: rectangles of patches, as BEiT"
    )
    patch: PositiveInt = Field(16, description="side of a patch in pixels, as backbone.patch")
    block: PositiveInt = Field(16, description="least number of patches in a rectangle (kind: block)")
    aspect: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.3, 1 / 0.3), description="range of a rectangle's height / width (kind: block)"
    )

    @model_validator(mode="after")
    def _fits(self) -> MaskConfig:
        if self.aspect[0] > self.aspect[1]:
            raise ValueError(f"aspect must be a range from low to high, not {self.aspect}")
        for name in ("block", "aspect"):
            if self.kind != "block" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for kind: block: leave it out, or set kind")
        return self

    def patches(self, size: int) -> int:
        """Patches in a view of `size` pixels."""
        return (size // self.patch) ** 2

    def hidden(self, size: int) -> int:
        """How many of them are masked."""
        return round(self.ratio * self.patches(size))


class ViewConfig(Section):
    """How one view (or `count` views alike) is made."""

    count: PositiveInt = Field(1, description="how many views are made this way")
    size: PositiveInt = Field(224, description="side of the view in pixels")
    scale: tuple[PositiveFloat, PositiveFloat] = Field((0.08, 1.0), description="crop area, as a share of the image")
    ratio: tuple[PositiveFloat, PositiveFloat] = Field((3 / 4, 4 / 3), description="crop aspect, width / height")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    jitter: JitterConfig | None = Field(JitterConfig(), description="colour jitter; null for none")
    grey: Fraction = Field(0.2, description="probability of greyscale")
    blur: BlurConfig | None = Field(None, description="Gaussian blur; null for none")
    solarize: Fraction = Field(0.0, description="probability of solarizing above 0.5")
    mask: MaskConfig | None = Field(
        None,
        description="hide patches from a ViT; null for none. To have it in place of the crop: scale [1, 1], ratio "
        "[1, 1], which give the central square",
    )

    @model_validator(mode="after")
    def _ranges(self) -> ViewConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a range from low to high, not ({low}, {high})")
        if self.scale[1] > 1:
            raise ValueError(f"scale cannot pass 1, got {self.scale[1]}")
        if self.blur is not None and self.blur.kernel // 2 >= self.size:
            raise ValueError(f"blur.kernel {self.blur.kernel} is too large for a view of {self.size} pixels")
        if self.mask is not None:
            if self.size % self.mask.patch:
                raise ValueError(indivisible(self.size, "mask.patch", self.mask.patch))
            patches, hidden = self.mask.patches(self.size), self.mask.hidden(self.size)
            if not 0 < hidden < patches:
                raise ValueError(
                    f"mask.ratio {self.mask.ratio} of {patches} patches hides {hidden}: it must leave at least 1 and "
                    "hide at least 1"
                )
        return self


class AugmentConfig(Section):
    """The views and where they are made."""

    placement: Literal["device", "pool"] = Field(
        "device", description="device: on the training device, one batch ahead; pool: in a Ray Data actor pool"
    )
    pool_actors: PositiveInt = Field(1, description="actors per train worker (placement: pool)")
    pool_gpus: NonNegative = Field(0.0, description="GPUs that one actor reserves, may be a fraction (placement: pool)")
    pool_cpus: NonNegative = Field(0.25, description="CPUs that one actor reserves (placement: pool)")
    views: tuple[ViewConfig, ...] = Field(
        (ViewConfig(count=2),), min_length=1, description="global views first, then local ones (multi-crop)"
    )
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="per channel, of images in [0, 1]")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(IMAGENET_STD, description="per channel")

    @property
    def cpus_beside(self) -> float:
        """CPUs that the pool of a train worker reserves."""
        return self.pool_cpus * self.pool_actors if self.placement == "pool" else 0.0
