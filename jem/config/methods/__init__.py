"""The methods' settings, by family. A method takes only its own; `name` says which it is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jem.config.methods.base import JointSettings, MethodSettings, RegulariseConfig, Traits
from jem.config.methods.comparison import SupervisedConfig
from jem.config.methods.regularised import VICRegConfig

__all__ = [
    "METHODS",
    "JointSettings",
    "MethodConfig",
    "MethodSettings",
    "RegulariseConfig",
    "SupervisedConfig",
    "Traits",
    "VICRegConfig",
]

MethodConfig = Annotated[VICRegConfig | SupervisedConfig, Field(discriminator="name")]

METHODS: dict[str, type[MethodSettings]] = {
    each.model_fields["name"].default: each for each in (VICRegConfig, SupervisedConfig)
}
"""By name, in the order of the table."""
