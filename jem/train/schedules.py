"""Schedules: functions of the step, which runs from 0 to total - 1."""

from __future__ import annotations

import math
from typing import Literal


def scaled_lr(base: float, batch_size: int, rule: Literal["linear", "sqrt", "none"]) -> float:
    """Highest learning rate for a global batch, from the rate for a batch of 256.

    linear: Goyal et al., 2017; sqrt: Krizhevsky, 2014.
    """
    match rule:
        case "linear":
            return base * batch_size / 256
        case "sqrt":
            return base * math.sqrt(batch_size / 256)
        case "none":
            return base


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, total - 1, and after it."""
    progress = min(1.0, step / max(1, total - 1))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(
    step: int,
    *,
    total: int,
    peak: float,
    warmup: int = 0,
    decay: Literal["cosine", "constant"] = "cosine",
    final: float = 0.0,
) -> float:
    """Linear warm-up, then decay.

    Args:
        step: 0 ... total - 1.
        total: steps in the whole training, warm-up included.
        peak: highest rate, reached at step `warmup`.
        warmup: steps of the warm-up, which begins with a rate of 0.
        decay: cosine (Loshchilov and Hutter, 2017) from `peak` to `final * peak` at the last step, or constant.
        final: last rate as a share of `peak`.
    """
    if step < warmup:
        return peak * step / warmup
    if decay == "constant":
        return peak
    return cosine(step - warmup, total - warmup, peak, final * peak)


def weight_decay(step: int, *, total: int, start: float, final: float | None = None) -> float:
    """Cosine from `start` at step 0 to `final` at the last step (DINO); constant where `final` is None."""
    return start if final is None else cosine(step, total, start, final)
