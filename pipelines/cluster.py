"""Joining or starting Ray, and checking that a job fits before anything starts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import ray
from ray._private.services import find_bootstrap_address
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jem.config import ClusterConfig, StreamConfig
from jem.errors import InputError

CONNECT_SECONDS = 10.0
KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""Ray ends processes that idle for a second when there are more than CPUs, and every decode task would start its own
again: 3 s of a core each, which halved the training rate on 2 cores."""
NODE_CHECK_SECONDS = 60.0
LOOK_SECONDS = 2.0
"""Between looks for nodes that the autoscaler was asked for."""
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    id: str
    cpus: float
    gpus: float
    store: float
    """Bytes of its object store."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that a job runs on."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        return f"{len(self.nodes)} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@dataclass(frozen=True)
class Placement:
    """How a training job is laid on the cluster."""

    gpu: bool
    """One GPU per train worker."""
    decode_tasks: int
    """Decode tasks at a time per train worker."""


TRIAL_CPUS = 0.01
"""CPUs that the actor beside each training of a search reserves: it waits most of the time."""


@contextlib.contextmanager
def connect(config: ClusterConfig, *, dashboard: bool = False) -> Iterator[Cluster]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a Ray of its own that ends with the block.

    A Ray that this process is connected to already is used and left as it is. The `dashboard` answers what Ray Train
    asks when a training's driver died: whether to give back what it held.

    Raises:
        InputError: No cluster answers at the address.
    """
    ours = not ray.is_initialized()
    if ours:
        address = config.address or os.environ.get("RAY_ADDRESS")
        if address:
            _join(address)
        else:
            os.environ.setdefault(*KEEP_IDLE)
            # not "auto", which would be a cluster that runs here, or ran
            ray.init("local", include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            # Ray's own writes a C++ stack into the log first; the handler that it gave Python only ends the process
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        yield look()
    finally:
        if ours:
            ray.shutdown()


def look() -> Cluster:
    """The cluster that this process is connected to, as it is now."""
    nodes = [
        Node(node["NodeID"], *(node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "object_store_memory")))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return Cluster(tuple(nodes))


def _join(address: str) -> None:
    """Connect to a running cluster; a host that does not answer is found out before Ray retries for minutes."""
    if address == "auto":
        address = find_bootstrap_address(None) or address  # of the last cluster started here, which may be gone
    target = urlsplit(address if "://" in address else f"gcs://{address}")
    advice = "check cluster.address and RAY_ADDRESS, or leave both out to run on this machine"
    try:
        if target.hostname and target.port:
            socket.create_connection((target.hostname, target.port), CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no Ray cluster answers at {address} ({reason}): {advice}") from error


def place(
    config: ClusterConfig,
    stream: StreamConfig,
    cluster: Cluster,
    pool_cpus: float = 0.0,
    worlds: Sequence[int] | None = None,
    trials: int | None = None,
) -> Placement:
    """Check that train workers and their decode tasks fit, and share out the CPUs that are left for decoding.

    `pool_cpus` are the CPUs that each worker's augmentation actors take. Of an elastic run `worlds` are the numbers of
    workers that it may have, from the least, which must fit. `trials` are the trainings of a search that run at a time.

    Raises:
        InputError: They do not fit; the message says what the cluster has and what was asked for.
    """
    worlds = worlds or [config.workers]
    gpu = config.gpu if config.gpu is not None else cluster.gpus >= worlds[0]
    fits = sum(
        int(min(node.cpus // config.cpus_per_worker, node.gpus if gpu else float("inf"))) for node in cluster.nodes
    )
    each, times = config.cpus_per_worker + pool_cpus, trials or 1
    cpus = cluster.cpus - (trials or 0) * TRIAL_CPUS
    workers = times * max(
        (
            world
            for world in worlds
            if times * world <= fits and times * world * (each + stream.decode_cpus) <= cpus + 1e-9
        ),
        default=worlds[0],
    )
    asked = f"{workers} workers x {config.cpus_per_worker:g} CPUs" + (" and 1 GPU" if gpu else "")
    lower = "lower " + ("search.concurrent, " if trials is not None else "")
    lower += "cluster.workers" if config.min_workers is None else "cluster.min_workers"
    if fits < workers:
        raise InputError(
            f"the cluster has {cluster}, which holds {fits} of {asked}: {lower}"
            + (" or set cluster.gpu false" if gpu else " or cluster.cpus_per_worker")
            + ", or add nodes"
        )
    left = cpus - workers * each
    tasks = int(left / workers / stream.decode_cpus + 1e-9)
    if tasks < 1:
        raise InputError(
            f"the cluster has {cluster}; {asked} leave {max(left, 0):g} CPUs for decoding, which needs "
            f"{stream.decode_cpus:g} per worker: {lower}, cluster.cpus_per_worker or stream.decode_cpus"
        )
    # As many as CPUs: more would only make the batches come in bursts (2 cores, photographs: 683 images/s and the next
    # batch within 0.42 s with 2 tasks, 676 and 0.56 s with 3). They reserve less so that a small machine can hold them.
    useful = max(1, int(cluster.cpus / workers))
    return Placement(gpu=gpu, decode_tasks=min(stream.decode_tasks or useful, tasks))


def await_room(
    config: ClusterConfig, each: dict[str, float], count: int, fit: Callable[[Cluster], T]
) -> tuple[Cluster, T]:
    """The cluster, and what `fit` makes of it; where it does not fit, when the autoscaler has brought nodes.

    It is asked for the room of `count` bundles of resources `each`, and no longer once the job fits: what the job then
    holds keeps the nodes.

    Raises:
        InputError: It does not fit, even after `cluster.wait_for_nodes` seconds.
    """
    end, asked = time.monotonic() + config.wait_for_nodes, False
    try:
        while True:
            cluster = look()
            try:
                return cluster, fit(cluster)
            except InputError as error:
                if time.monotonic() >= end:
                    raise
                if not asked:
                    asked = True
                    print(f"waiting at most {config.wait_for_nodes:g} s for nodes: {error}", flush=True)
                    request_resources(bundles=[each] * count)
            time.sleep(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
    finally:
        if asked:
            request_resources(bundles=[])


def bundle(config: ClusterConfig, stream: StreamConfig, pool_cpus: float) -> dict[str, float]:
    """What one train worker takes, with its augmentation actors and one decode task."""
    cpus = config.cpus_per_worker + pool_cpus + stream.decode_cpus
    return {"CPU": cpus, "GPU": 1.0} if config.gpu else {"CPU": cpus}


def check_shared(cluster: Cluster, storage: str, data: str) -> None:
    """Check that every node can write `storage` and sees `data`, when there are several nodes.

    Raises:
        InputError: A node cannot, with its address.
    """
    if len(cluster.nodes) < 2:
        return
    local = {key: path for key, path in {"storage": storage, "data": data}.items() if "://" not in path}
    with _marked(local.get("storage")) as marker:

        @ray.remote(num_cpus=0)
        def missing() -> list[str]:
            lost = []
            if marker is not None and not marker.exists():
                lost.append(f"storage {storage}")
            if "data" in local and not Path(data.partition("*")[0]).exists() and not Path(data).parent.exists():
                lost.append(f"data {data}")
            return lost

        for node in cluster.nodes:
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
            try:
                lost = ray.get(missing.options(scheduling_strategy=strategy).remote(), timeout=NODE_CHECK_SECONDS)
            except ray.exceptions.GetTimeoutError:
                raise InputError(
                    f"node {node.id[:8]} did not answer in {NODE_CHECK_SECONDS:.0f} s: see `ray status`"
                ) from None
            except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                continue  # it was lost a moment ago: whether the others suffice is Ray Train's to find out
            if lost:
                raise InputError(
                    f"node {node.id[:8]} does not see {' and '.join(lost)}: use a folder that all nodes share, or a URI"
                )


@contextlib.contextmanager
def _marked(folder: str | None) -> Iterator[Path | None]:
    """A file in the folder, which is made for it if there is none, and gone afterwards as before."""
    if folder is None:
        yield None
        return
    made = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    marker = Path(folder) / f".jem-{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)
        if made:
            Path(folder).rmdir()
