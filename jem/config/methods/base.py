"""What the settings of every method have in common, and what a method says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from jem.config.section import NonNegative, Section

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig

Family = Literal["contrastive", "regularised", "clustering", "distillation", "comparison"]
Need = Literal["negatives", "momentum", "predictor", "clusters", "ids", "multi-crop", "ViT", "labels"]


@dataclass(frozen=True)
class Traits:
    """A method's row in the table of methods."""

    title: str
    """Its name in print."""
    family: Family
    prevents: str
    """What keeps it from collapsing, in a few words."""
    paper: str
    """Authors, year, and arXiv number."""
    needs: tuple[Need, ...] = ()
    views: Literal["one", "two", "many"] = "two"
    """one: exactly one view; two: exactly two; many: two global ones and any number of local ones (multi-crop)."""
    scaled: bool = False
    """The loss holds the embedding to a scale (a standard deviation of 1), so a small one is a collapse."""
    bears: int = 2
    """The smallest global batch that it is known to do well with; below it a run begins with a warning."""


class MethodSettings(Section):
    """Base of all methods' settings."""

    traits: ClassVar[Traits]
    name: str

    def check(self, run: PretrainConfig) -> None:
        """Refuse a run whose other settings this method cannot work with, before anything starts.

        Raises:
            ValueError: what does not fit, why, and what to change.
        """
        count = sum(view.count for view in run.augment.views)
        title = self.traits.title
        if self.traits.views == "one" and count != 1:
            raise ValueError(f"augment.views makes {count} views, and {title} takes 1: lower count")
        if self.traits.views == "two" and count != 2:
            more = " (it cannot use multi-crop)" if count > 2 else ""
            raise ValueError(f"augment.views must make exactly 2 views for {title}, not {count}{more}")
        if self.traits.views == "many" and count < 2:
            raise ValueError(f"augment.views makes {count} view, and {title} needs 2 global ones: set count to 2")


class RegulariseConfig(Section):
    """VICReg's variance and covariance terms, added to another method's loss (the paper's table 4)."""

    mu: NonNegative = Field(1.0, description="weight of the variance term")
    nu: NonNegative = Field(0.04, description="weight of the covariance term")


class JointSettings(MethodSettings):
    """Settings of the joint embedding methods, all but VICReg."""

    regularise: RegulariseConfig | None = Field(
        None, description="VICReg's variance and covariance terms, added to the loss; default: none"
    )
