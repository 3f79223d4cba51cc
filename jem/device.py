"""The device that a process works on: a GPU that nothing waits for, or a CPU whose memory is kept."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

KEPT_BYTES, KEPT_BY_OLD = 2**30, 2**25
"""Of freed memory; and what an older glibc takes for it at most."""


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait, as it would for a copy from memory that is not pinned."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def use_cpu(threads: int) -> None:
    """Let torch use so many threads of a CPU, and keep freed memory for the next step, where the C library is glibc's.

    It gives large blocks back to the system as they are freed, and each step would begin with half of a million page
    faults: 8 % of the time of a ResNet-18 at 32 px.
    """
    torch.set_num_threads(max(1, threads))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, KEPT_BYTES) or mallopt(mmap_threshold, KEPT_BY_OLD)
        mallopt(trim_threshold, KEPT_BYTES)
