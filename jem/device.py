"""What goes to the training device without a wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait, as it would for a copy from memory that is not pinned."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
