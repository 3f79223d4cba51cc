"""What a training is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from jem.config import PretrainConfig
from jem.data.cache import Cache
from jem.data.index import Index
from jem.data.plan import Plan
from jem.train.checkpoint import State
from jem.train.watch import Summary


@dataclass(frozen=True)
class Job:
    """All that a train worker needs to know."""

    config: PretrainConfig
    name: str
    storage: str
    """Absolute folder, or URI, in which the run's own folder is."""
    index: Index
    test: Index | None
    classes: int | None
    gpu: bool
    decode_tasks: int
    """At a time, per worker."""
    cache: Cache | None
    tracking_uri: str
    run_id: str
    share: float = 1.0
    """Of a machine's cores, where trainings run side by side."""

    def plan(self, world: int | None = None) -> Plan:
        """The order of the images, for so many workers; default: the most that the run may have."""
        config = self.config
        return Plan(
            self.index.rows,
            config.seed,
            config.train.batch_size,
            world or config.cluster.workers,
            config.stream.window,
            config.stream.remainder,
            config.parts,
        )


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    state: State
    summary: Summary
    checkpoint: str
    """Where the last checkpoint is."""
