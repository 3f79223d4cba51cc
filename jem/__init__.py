"""jem: pretrain image encoders without labels, by joint embedding methods, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jem.encoder import Encoder

__all__ = ["load_encoder"]
__version__ = "0.1.0"


def load_encoder(uri: str) -> Encoder:
    """Load a pretrained encoder; see `jem.tracking.registry.load_encoder`."""
    from jem.tracking.registry import load_encoder

    return load_encoder(uri)
