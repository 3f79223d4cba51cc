"""What a checkpoint holds, and how it is written and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jem.errors import InputError

FILE = "state.pt"


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had not stopped.

    The number of steps is also the stream's position, and the state of every generator: the stream, the augmentation
    and the methods draw from generators seeded by (seed, epoch, step, part or rank).
    """

    model: dict[str, Any]
    """The method's parameters and buffers: backbone, heads, momentum networks, queues."""
    optimizer: dict[str, Any]
    step: int
    """Optimizer steps done, over all epochs."""
    parts: int
    """That each epoch is cut into, whatever the number of workers."""


def save(state: State, folder: Path) -> None:
    """Write `state` to `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    torch.save({name: getattr(state, name) for name in State.__dataclass_fields__}, part)
    part.rename(folder / FILE)


def load(folder: Path) -> State:
    """Read a state to the CPU, without unpickling.

    Raises:
        InputError: There is none, or it is not one.
    """
    path = folder / FILE
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise InputError(f"no checkpoint in {folder}") from None
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint ({str(error).splitlines()[0]})") from error
