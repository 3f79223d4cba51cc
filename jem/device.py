"""The device that a process works on: a GPU that nothing waits for, or a CPU whose memory is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from jem.memory import keep_freed


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait, as it would for a copy from memory that is not pinned."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def use_cpu(threads: int) -> None:
    """Let torch use so many threads of a CPU, and keep freed memory for the next step."""
    torch.set_num_threads(max(1, threads))
    keep_freed()
