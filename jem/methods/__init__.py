"""Joint embedding methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jem.config import (
    BarlowConfig,
    BYOLConfig,
    Data2vecConfig,
    DeepClusterConfig,
    DenoisingConfig,
    DINOConfig,
    DirectPredConfig,
    JigsawConfig,
    MarginConfig,
    MoCoConfig,
    MoCoV3Config,
    OBoWConfig,
    PIRLConfig,
    RotationConfig,
    SimCLRConfig,
    SimSiamConfig,
    SupervisedConfig,
    SwAVConfig,
    TripletConfig,
    VICRegConfig,
    WMSEConfig,
)
from jem.errors import InputError
from jem.methods.barlow import BarlowTwins
from jem.methods.base import Method, Progress, StepOutput
from jem.methods.byol import BYOL
from jem.methods.data2vec import Data2vec
from jem.methods.deepcluster import DeepCluster
from jem.methods.denoising import Denoising
from jem.methods.dino import DINO
from jem.methods.directpred import DirectPred
from jem.methods.jigsaw import Jigsaw
from jem.methods.margin import Margin
from jem.methods.moco import MoCo
from jem.methods.mocov3 import MoCoV3
from jem.methods.obow import OBoW
from jem.methods.pirl import PIRL
from jem.methods.rotation import Rotation
from jem.methods.simclr import SimCLR
from jem.methods.simsiam import SimSiam
from jem.methods.supervised import Supervised
from jem.methods.swav import SwAV
from jem.methods.triplet import Triplet
from jem.methods.vicreg import VICReg
from jem.methods.wmse import WMSE

if TYPE_CHECKING:
    from jem.config import BackboneConfig, MethodConfig

__all__ = ["Method", "Progress", "StepOutput", "build_method"]


def build_method(  # noqa: C901, PLR0912 - a case for each method
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
        case SimCLRConfig():
            return SimCLR(config, backbone)
        case MoCoConfig():
            return MoCo(config, backbone)
        case MoCoV3Config():
            return MoCoV3(config, backbone)
        case PIRLConfig():
            if images is None:
                raise InputError("method pirl keeps a row for each image, and the data set's size is not known")
            return PIRL(config, backbone, images)
        case VICRegConfig():
            return VICReg(config, backbone)
        case BarlowConfig():
            return BarlowTwins(config, backbone)
        case WMSEConfig():
            return WMSE(config, backbone)
        case SwAVConfig():
            return SwAV(config, backbone)
        case DeepClusterConfig():
            if images is None:
                raise InputError("method deepcluster keeps a row for each image, and the data set's size is not known")
            return DeepCluster(config, backbone, images)
        case OBoWConfig():
            return OBoW(config, backbone)
        case BYOLConfig():
            return BYOL(config, backbone)
        case SimSiamConfig():
            return SimSiam(config, backbone)
        case DirectPredConfig():
            return DirectPred(config, backbone)
        case DINOConfig():
            return DINO(config, backbone)
        case Data2vecConfig():
            return Data2vec(config, backbone)
        case SupervisedConfig():
            if not classes:
                raise InputError("method supervised needs labels, and the data set has none: choose another method")
            return Supervised(config, backbone, classes)
        case DenoisingConfig():
            return Denoising(config, backbone)
        case JigsawConfig():
            return Jigsaw(config, backbone)
        case RotationConfig():
            return Rotation(config, backbone)
        case TripletConfig():
            return Triplet(config, backbone)
        case MarginConfig():
            return Margin(config, backbone)
