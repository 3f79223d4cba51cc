"""Settings of what joint embedding methods are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from jem.config.methods.base import MethodSettings, Traits
from jem.config.section import Fraction

if TYPE_CHECKING:
    from jem.config.jobs import PretrainConfig


class SupervisedConfig(MethodSettings):
    """Cross entropy on the labels, for comparison; one view is enough."""

    traits: ClassVar = Traits(
        title="Supervised",
        family="comparison",
        prevents="labels",
        paper="He, Zhang, Ren, Sun, 2016, arXiv 1512.03385",
        needs=("labels",),
    )
    name: Literal["supervised"] = "supervised"
    label_smoothing: Fraction = 0.0

    def check(self, run: PretrainConfig) -> None:
        """Any number of views will do."""
