"""How many workers a run has, where that may change while it runs: Ray Train's elastic policy with our conditions.

Ray Train's own takes any number that the cluster has room for, and restarts at once. Here the number divides the parts
of the epoch, leaves a place for decoding, and the workers keep a checkpoint before they are restarted; and waiting for
the least number has an end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig  # mypy takes ray.train's for that of Train V1, and the trainer too
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jem.errors import RunError

ANSWER_SECONDS = 30.0
PAUSE_SECONDS = 1.0
"""Between looks for workers while there are too few: Ray Train would look without a pause."""
PROBE_SECONDS = 10.0
"""In which a node must run a task that does nothing."""
KEEP_SECONDS = 300.0
"""In which the workers must have kept a checkpoint before a resize; it costs the steps since the last one otherwise."""


class ElasticTrainer(TorchTrainer):
    """A `TorchTrainer` whose number of workers is chosen by `policy`."""

    def __init__(self, *args: Any, policy: ElasticScalingPolicy, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = policy

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": self._policy})


class Divisors(ElasticScalingPolicy):
    """As many workers as there is room for, of certain numbers."""

    def __init__(
        self, scaling: ScalingConfig, worlds: Sequence[int], beside: float, deadline: float, mailbox: Any
    ) -> None:
        """Its state goes to Ray Train's controller.

        Args:
            scaling: Least and greatest number, and what a worker takes.
            worlds: The numbers that may be chosen.
            beside: CPUs that each worker needs on the cluster beside its own, for decoding.
            deadline: Seconds in which the least number must be there.
            mailbox: Carries the wish for a checkpoint to the workers, and the answer; see `mailbox.Mailbox`.
        """
        super().__init__(scaling)
        self._worlds, self._beside, self._deadline, self._mailbox = tuple(worlds), beside, deadline, mailbox
        self._short_since: float | None = None
        self._answering: set[str] | None = None
        self._wanted: tuple[ResizeDecision, float, int] | None = None
        self._kept = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with as many as there is room for, or wait for the least.

        Raises:
            RunError: There was no room for the least number before the deadline.
        """
        self._wanted = None
        self._answering = self._nodes_that_answer()
        decision = super().make_decision_for_non_running_worker_group()
        self._answering = None
        if isinstance(decision, ResizeDecision):
            self._short_since = None
            return decision
        now = time.monotonic()
        self._short_since = self._short_since or now
        if now - self._short_since > self._deadline:
            raise RunError(
                f"the cluster had no room for cluster.min_workers {self._worlds[0]} in {self._deadline:g} s "
                "(cluster.start_timeout): add nodes"
            )
        time.sleep(PAUSE_SECONDS)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Ask for a checkpoint where another number has room, and change to it once that is kept."""
        if self._wanted is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                number = self._ask("want", decision.num_workers)
                self._wanted, self._kept = (decision, time.monotonic(), number or 0), False
            return NoopDecision()
        decision, since, number = self._wanted
        if self._kept or time.monotonic() - since > KEEP_SECONDS:
            self._wanted = None
            return decision
        # one round more, in which Ray Train learns of the checkpoint
        self._kept = (self._ask("answered") or 0) >= number
        return NoopDecision()

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What is reserved for this run on each node now; Ray Train's own may be 20 s old, and the nodes gone."""
        coordinator: Any = self._autoscaling_coordinator
        try:
            reserved: dict[str, dict[str, float]] = ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=ANSWER_SECONDS
            )
        except RayError:
            return None
        return reserved

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """As many as have room on nodes that live and stay, with their decoding."""
        leaving = ray._private.state.state.get_draining_nodes() or {}  # noqa: SLF001 - Ray Train asks so too
        nodes = {
            node["NodeID"]: node["Resources"]
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["NodeID"] not in leaving
        }
        if self._answering is not None:
            nodes = {key: resources for key, resources in nodes.items() if key in self._answering}
        room = super()._count_possible_workers({key: each for key, each in reserved_resources.items() if key in nodes})
        cpus = sum(resources.get("CPU", 0.0) for resources in nodes.values())
        each = self.scaling_config._resources_per_worker_not_none.get("CPU", 0.0) + self._beside  # noqa: SLF001
        return max((world for world in self._worlds if world <= room and world * each <= cpus + 1e-9), default=0)

    def _nodes_that_answer(self) -> set[str]:
        """A node that is lost is listed as alive for up to a minute: workers on it would be waited for in vain."""
        probe: Any = ray.remote(num_cpus=0)(_here)
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        asked = {
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False)).remote(): key
            for key in alive
        }
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
        found = set()
        for reference in done:
            with contextlib.suppress(RayError):
                ray.get(reference)
                found.add(asked[reference])
        return found

    def _ask(self, method: str, *arguments: Any) -> int | None:
        try:
            answer: int = ray.get(getattr(self._mailbox, method).remote(*arguments), timeout=ANSWER_SECONDS)
        except RayError:
            return None
        return answer


def _here() -> None:
    """The task that a node answers with."""
