"""The methods' settings, by family. A method takes only its own; `name` says which it is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jem.config.methods.base import JointSettings, MethodSettings, RegulariseConfig, Traits
from jem.config.methods.clustering import DeepClusterConfig, OBoWConfig, SwAVConfig
from jem.config.methods.comparison import (
    DenoisingConfig,
    JigsawConfig,
    MarginConfig,
    RotationConfig,
    SupervisedConfig,
    TripletConfig,
)
from jem.config.methods.contrastive import MoCoConfig, MoCoV3Config, PIRLConfig, SimCLRConfig
from jem.config.methods.distillation import BYOLConfig, Data2vecConfig, DINOConfig, DirectPredConfig, SimSiamConfig
from jem.config.methods.regularised import BarlowConfig, VICRegConfig, WMSEConfig

__all__ = [
    "METHODS",
    "BYOLConfig",
    "BarlowConfig",
    "DINOConfig",
    "Data2vecConfig",
    "DeepClusterConfig",
    "DenoisingConfig",
    "DirectPredConfig",
    "JigsawConfig",
    "JointSettings",
    "MarginConfig",
    "MethodConfig",
    "MethodSettings",
    "MoCoConfig",
    "MoCoV3Config",
    "OBoWConfig",
    "PIRLConfig",
    "RegulariseConfig",
    "RotationConfig",
    "SimCLRConfig",
    "SimSiamConfig",
    "SupervisedConfig",
    "SwAVConfig",
    "Traits",
    "TripletConfig",
    "VICRegConfig",
    "WMSEConfig",
]

MethodConfig = Annotated[
    SimCLRConfig
    | MoCoConfig
    | MoCoV3Config
    | PIRLConfig
    | VICRegConfig
    | BarlowConfig
    | WMSEConfig
    | SwAVConfig
    | DeepClusterConfig
    | OBoWConfig
    | BYOLConfig
    | SimSiamConfig
    | DirectPredConfig
    | DINOConfig
    | Data2vecConfig
    | SupervisedConfig
    | DenoisingConfig
    | JigsawConfig
    | RotationConfig
    | TripletConfig
    | MarginConfig,
    Field(discriminator="name"),
]

METHODS: dict[str, type[MethodSettings]] = {
    each.model_fields["name"].default: each
    for each in (
        SimCLRConfig,
        MoCoConfig,
        MoCoV3Config,
        PIRLConfig,
        VICRegConfig,
        BarlowConfig,
        WMSEConfig,
        SwAVConfig,
        DeepClusterConfig,
        OBoWConfig,
        BYOLConfig,
        SimSiamConfig,
        DirectPredConfig,
        DINOConfig,
        Data2vecConfig,
        SupervisedConfig,
        DenoisingConfig,
        JigsawConfig,
        RotationConfig,
        TripletConfig,
        MarginConfig,
    )
}
"""By name, in the order of the table."""
