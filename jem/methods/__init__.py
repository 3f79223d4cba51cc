"""Joint embedding methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jem.config import SupervisedConfig, VICRegConfig
from jem.errors import InputError
from jem.methods.base import Method, Progress, StepOutput
from jem.methods.supervised import Supervised
from jem.methods.vicreg import VICReg

if TYPE_CHECKING:
    from jem.config import BackboneConfig, MethodConfig

__all__ = ["Method", "Progress", "StepOutput", "build_method"]


def build_method(
    config: MethodConfig, backbone: BackboneConfig, classes: int | None = None, images: int | None = None
) -> Method:
    """Make the method of `config`, its weights drawn from torch's global generator.

    Args:
        config: which method, and its settings.
        backbone: the network that is kept (`method.branches` may name others).
        classes: number of classes in the data set, None where it has no labels.
        images: number of images in the data set: their ids are less. None where it is not known.

    Raises:
        InputError: a supervised method without labels.
    """
    match config:
        case VICRegConfig():
            return VICReg(config, backbone)
        case SupervisedConfig():
            if not classes:
                raise InputError("method supervised needs labels, and the data set has none: choose another method")
            return Supervised(config, backbone, classes)
