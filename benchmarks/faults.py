"""What is lost when something breaks: a training on a real Ray cluster of several nodes, harmed while it runs.

    python benchmarks/faults.py [--only kills grow ...] [--folder DIR] [--kills 10] [--away 60]

It starts a Ray head without work and worker nodes, each with processes of its own, and an MLflow server, on this
machine; writes 320 tiny images; trains undisturbed, then with each fault; and prints what each one cost. Every train
worker notes the ids of its batches: from these it is known which steps were done twice, and that in the end each image
was seen once per epoch. On a CPU the weights of two runs can be compared bit for bit.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGES, SHARDS, BATCH, EPOCHS = 320, 4, 64, 6
STEPS = IMAGES // BATCH * EPOCHS
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_TRAIN_CALLBACKS": "benchmarks.faults.Noted",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "2",
}
NOTES = "JEM_FAULTS_NOTES"
"""Variable with the folder where train workers note what they see."""
DEADLINE = 300.0

if __name__ == "__main__":
    repository = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, repository)
    os.environ.update(SETTINGS | {"PYTHONPATH": os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])})

from ray.train.v2._internal.execution.callback import WorkerCallback  # noqa: E402 - the settings above come first


class Noted(WorkerCallback):
    """Lets each train worker note the ids of its batches, as it takes them; made by Ray Train (RAY_TRAIN_CALLBACKS)."""

    def __init__(self) -> None:
        self._folder = os.environ[NOTES]

    def after_init_train_context(self) -> None:
        """Called on each train worker."""
        from jem.train import launch

        real, folder = launch._views, self._folder  # noqa: SLF001 - nothing else sees the batches

        def noted(job: Any, plan: Any, rank: int, start: Any, *rest: Any) -> Iterator[Any]:
            with Path(folder, f"{job.name}.{time.time_ns()}.{os.getpid()}").open("w", buffering=1) as out:
                first = plan.number(start)
                for number, views in enumerate(real(job, plan, rank, start, *rest), start=first):
                    note = {"step": number + 1, "rank": rank, "world": plan.world, "ids": views.id.tolist()}
                    out.write(json.dumps(note) + "\n")
                    yield views

        launch._views = noted  # noqa: SLF001


def notes_of(name: str) -> list[dict[str, Any]]:
    """What the workers of a run noted, in the order of its starts."""
    found = []
    for path in sorted(Path(os.environ[NOTES]).glob(f"{name}.*")):
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the last one of a killed worker
                found.append(json.loads(line) | {"start": path.name})
    return found


# --- the cluster ------------------------------------------------------------------------------------------------------


def write_images(folder: Path) -> None:
    """Coloured squares with a gradient, in several shards."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random_numbers = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard, rows in enumerate(np.array_split(np.arange(IMAGES), SHARDS)):
        cells = []
        for _ in rows:
            small = random_numbers.integers(0, 256, (4, 4, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": ""})
        table = pa.table({"image": cells, "label": rows % 10, "id": rows})
        pq.write_table(table, folder / f"part-{shard:05d}.parquet", row_group_size=20)


class Server:
    """An MLflow server of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        log = (self._folder / "mlflow.log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):  # noqa: S310
                return
            time.sleep(0.5)
        raise TimeoutError(f"the MLflow server does not answer: see {self._folder}/mlflow.log")

    def stop(self) -> None:
        """Kill it, with its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@dataclass
class Lab:
    """The cluster, the data and the runs."""

    folder: Path
    server: Server
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)

    def add_node(self) -> Any:
        """A node that holds one train worker, and decodes beside it."""
        self.nodes.append(self.cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20))
        return self.nodes[-1]

    def lose_node(self, node: Any) -> None:
        """Kill all processes of a node at once."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def workers(self) -> list[Any]:
        """The processes of Ray Train's workers that live on this machine's cluster."""
        import psutil

        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            with suppress(psutil.Error):
                if "RayTrainWorker" in command and process.environ().get(NOTES) == os.environ[NOTES]:
                    found.append(process)
        return found

    def config(self, name: str, **changes: Any) -> Any:
        """A small run; `changes` by section."""
        from jem.config import PretrainConfig

        values: dict[str, Any] = {
            "data": str(self.folder / "data"),
            "name": name,
            "storage": str(self.folder / "runs"),
            "stream": {"canvas": 32, "window": 1},
            "augment": {"views": [{"count": 2, "size": 32, "scale": (0.4, 1.0)}]},
            "backbone": {"stem": "stride2"},
            "method": {"name": "vicreg", "expander": (64, 64)},
            "optimizer": {"name": "adamw", "lr": 0.004},
            "schedule": {"warmup_epochs": 1},
            "train": {
                "epochs": EPOCHS,
                "batch_size": BATCH,
                "log_every": 1,
                "checkpoint_every": 5,
                "keep_checkpoints": 3,
            },
            "cluster": {"workers": 2, "cpus_per_worker": 1.5, "max_failures": -1, "start_timeout": 120},
            "evaluation": {"online": None, "probe": None, "knn": {"k": 5}, "random_baseline": False},
            "track": {"experiment": "faults", "register_as": "faults", "uri": self.server.uri},
        }
        for section, change in changes.items():
            values[section] = values[section] | change if isinstance(change, dict) else change
        return PretrainConfig.model_validate(values)

    def last(self, name: str, step: int = STEPS) -> dict[str, Any]:
        """The weights of a checkpoint."""
        from jem.train import checkpoint

        return checkpoint.load(self.folder / "runs" / name / f"step-{step:08d}").model


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """Start everything, and end it."""
    import ray
    from ray.cluster_utils import Cluster

    (folder / "notes").mkdir(parents=True, exist_ok=True)
    os.environ[NOTES] = str(folder / "notes")
    os.environ["HOME"] = str(folder)
    if not (folder / "data").exists():
        write_images(folder / "data")
    server = Server(folder)
    made = Lab(folder, server)
    server.start()
    try:
        made.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False},
            shutdown_at_exit=False,  # else a node can be added in the main thread alone; they are ended below
        )
        for _ in range(2):
            made.add_node()
        ray.init(address=made.cluster.address, log_to_driver=False, configure_logging=False)
        yield made
    finally:
        ray.shutdown()
        if made.cluster is not None:
            made.cluster.shutdown()
        server.stop()


# --- what happens -----------------------------------------------------------------------------------------------------


class Harm(threading.Thread):
    """Does something to a run in the background; what goes wrong in it is raised by `done`."""

    def __init__(self, act: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self._act, self._error, self._what = act, None, ""
        self.start()

    def run(self) -> None:
        """The thread."""
        try:
            self._what = self._act()
        except BaseException as error:  # noqa: BLE001 - raised again by `done`
            traceback.print_exc()  # at once: the run may wait for what it was to bring about
            self._error = error

    def done(self) -> str:
        """What was done."""
        self.join(DEADLINE)
        if self._error is not None:
            raise self._error
        if self.is_alive() or not self._what:
            raise TimeoutError("the fault did not come about before the run's end: nothing is shown")
        return self._what


def until(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.05)
    return found


def at_step(name: str, step: int) -> None:
    """Wait until a worker of the run has taken the batch of this step."""
    until(lambda: any(note["step"] >= step for note in notes_of(name)))


@dataclass
class Row:
    """A line of the table."""

    fault: str
    happened: str
    lost: str
    seconds: float
    equal: str


def account(lab: Lab, name: str, total: int) -> tuple[int, bool]:
    """Steps that were done more than once, and whether in the end each image was seen once in each epoch."""
    import numpy as np

    notes = [note for note in notes_of(name) if note["step"] <= total]
    final: dict[int, dict[str, dict[int, list[int]]]] = {}
    worlds = {}
    for note in notes:
        final.setdefault(note["step"], {})
        worlds[note["step"]] = note["world"]
        final[note["step"]][note["rank"]] = note["ids"]
    done = sum(note["rank"] == 0 for note in notes)
    per_epoch = IMAGES // BATCH
    once = True
    for epoch in range(total // per_epoch):
        ids = [
            number
            for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
            for rank in range(worlds[step])
            for number in final[step][rank]
        ]
        once &= len(ids) == IMAGES == len(np.unique(ids))
    return done - total, once


def runs_named(lab: Lab, name: str) -> list[Any]:
    """The MLflow runs of a name."""
    from mlflow import MlflowClient

    client = MlflowClient(lab.server.uri)
    experiment = client.get_experiment_by_name("faults").experiment_id
    return list(client.search_runs([experiment], f"tags.`jem.name` = '{name}'"))


def missing_points(lab: Lab, name: str, total: int) -> int:
    """Steps that the loss's curve in MLflow lacks; a step that is there twice is an error."""
    from mlflow import MlflowClient

    (run,) = runs_named(lab, name)
    steps = [point.step for point in MlflowClient(lab.server.uri).get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps)), "a step is in the curve twice"
    return total - len(steps)


def compare(lab: Lab, name: str, total: int) -> str:
    """Whether the last weights are those of the undisturbed run of as many steps."""
    import torch

    mine, theirs = lab.last(name, total), lab.last("undisturbed" if total == STEPS else "undisturbed-long", total)
    if all(torch.equal(mine[key], theirs[key]) for key in theirs):
        return "yes"
    return f"no, by {max(float((mine[key].double() - theirs[key].double()).abs().max()) for key in theirs):.2g}"


def run_with(lab: Lab, name: str, harm: Callable[[], str] | None, **changes: Any) -> tuple[str, float]:
    """Pretrain while it is harmed; returns what was done, and seconds."""
    from pipelines.pretrain import pretrain

    began = time.monotonic()
    thread = Harm(harm) if harm else None
    pretrain(lab.config(name, **changes))
    seconds = time.monotonic() - began
    return thread.done() if thread else "", seconds


def finished(lab: Lab, fault: str, name: str, happened: str, seconds: float, total: int = STEPS) -> Row:
    """The row of a run that came to its end, beside the undisturbed one of as many steps."""
    again, once = account(lab, name, total)
    (run,) = runs_named(lab, name)
    assert run.info.status == "FINISHED", run.info.status
    lost = f"{again} steps done again, {missing_points(lab, name, total)} metric points"
    equal = compare(lab, name, total)
    return Row(fault, f"{happened}; each image once per epoch: {'yes' if once else 'NO'}", lost, seconds, equal)


def undisturbed(lab: Lab, options: argparse.Namespace) -> Row:
    """The run that the others are compared with."""
    _, seconds = run_with(lab, "undisturbed", None)
    return finished(lab, "none", "undisturbed", "finished", seconds)


LONG = 30
"""Epochs of the runs that must last."""
LONG_STEPS = IMAGES // BATCH * LONG


def undisturbed_long(lab: Lab, options: argparse.Namespace) -> Row:
    """The same for the longer runs."""
    _, seconds = run_with(lab, "undisturbed-long", None, train={"epochs": LONG})
    return finished(lab, "none, longer", "undisturbed-long", "finished", seconds, LONG_STEPS)


def kills(lab: Lab, options: argparse.Namespace) -> Row:
    """SIGKILL of train workers and of whole nodes in turn, at random moments."""
    name, dice = "kills", random.Random(options.seed)

    def harm() -> str:
        dead: set[str] = set()
        for number in range(options.kills):
            until(lambda before=dead: {note["start"] for note in notes_of(name)} - before)
            time.sleep(dice.uniform(0, 12))
            dead = {note["start"] for note in notes_of(name)}
            step = max(note["step"] for note in notes_of(name))
            if number % 2:
                lab.lose_node(dice.choice(lab.nodes))
                lab.add_node()
            else:
                dice.choice(lab.workers()).kill()
            print(f"  {'node' if number % 2 else 'worker'} killed at step {step}", flush=True)
        return f"{(options.kills + 1) // 2} workers and {options.kills // 2} nodes killed, started again"

    happened, seconds = run_with(lab, name, harm, train={"epochs": LONG})
    return finished(lab, f"SIGKILL, {options.kills} times", name, happened, seconds, LONG_STEPS)


def drained(lab: Lab, options: argparse.Namespace) -> Row:
    """A node is announced to be lost, and is lost; without the notice there is no checkpoint."""
    import ray
    from ray.core.generated import autoscaler_pb2

    name = "drained"

    def harm() -> str:
        at_step(name, 20)
        node = lab.nodes[0]
        deadline = time.time() + 12
        gcs = ray._raylet.GcsClient(  # noqa: SLF001 - as `ray drain-node` does
            address=lab.cluster.address
        )
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        taken, why = gcs.drain_node(node.node_id, reason, "spot instance is taken back", int(deadline * 1000))
        assert taken, why
        kept = until(lambda: next((lab.folder / "runs" / name).glob("step-*/state.pt"), None), 12)
        while time.time() < deadline:
            time.sleep(0.05)
        lab.lose_node(node)
        lab.add_node()
        return f"checkpoint at once ({kept.parent.name}), node lost 12 s after the notice, another came"

    happened, seconds = run_with(lab, name, harm, train={"epochs": LONG, "checkpoint_every": 1000})
    return finished(lab, "preemption notice (node drained)", name, happened, seconds, LONG_STEPS)


def terminated(lab: Lab, options: argparse.Namespace) -> Row:
    """SIGTERM to a worker, and SIGKILL some seconds later."""
    name = "terminated"

    def harm() -> str:
        at_step(name, 20)
        victim = lab.workers()[-1]
        victim.send_signal(signal.SIGTERM)
        kept = until(lambda: next((lab.folder / "runs" / name).glob("step-*/state.pt"), None), 20)
        time.sleep(5)
        victim.kill()
        return f"checkpoint at once ({kept.parent.name}), SIGKILL 5 s later"

    happened, seconds = run_with(lab, name, harm, train={"epochs": LONG, "checkpoint_every": 1000})
    return finished(lab, "SIGTERM to a worker", name, happened, seconds, LONG_STEPS)


def mlflow_away(lab: Lab, options: argparse.Namespace) -> Row:
    """The MLflow server is killed, and started again."""
    name = "mlflow"

    def harm() -> str:
        at_step(name, 10)
        lab.server.stop()
        time.sleep(options.away)
        step = max(note["step"] for note in notes_of(name))
        lab.server.start()
        return f"server away for {options.away} s, training was at step {step} of {LONG_STEPS} when it came back"

    happened, seconds = run_with(lab, name, harm, train={"epochs": LONG})
    return finished(lab, "MLflow server stopped", name, happened, seconds, LONG_STEPS)


def _copy_of_data(lab: Lab, name: str) -> Path:
    copy = lab.folder / f"data-{name}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(lab.folder / "data", copy)
    return copy


def _truncate(lab: Lab, name: str, data: Path) -> str:
    at_step(name, 3)
    shard = sorted(data.glob("part-*.parquet"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    return "shard cut in half at step 3 or later"


def truncated(lab: Lab, options: argparse.Namespace) -> Row:
    """A shard is truncated, and so many images may be lost."""
    name = "truncated"
    data = _copy_of_data(lab, name)
    happened, seconds = run_with(
        lab, name, lambda: _truncate(lab, name, data), data=str(data), stream={"max_lost": 0.3}
    )
    again, _ = account(lab, name, STEPS)
    (run,) = runs_named(lab, name)
    counted = run.data.metrics.get("stream/lost", 0.0)
    happened += f"; finished, stream/lost {counted:.0f} of {IMAGES}"
    return Row("shard truncated, within the limit", happened, f"{again} steps done again", seconds, "no (by design)")


def over_the_limit(lab: Lab, options: argparse.Namespace) -> Row:
    """A shard is truncated, and none may be lost; then it is mended, and the run resumed."""
    name = "over"
    data = _copy_of_data(lab, name)
    return _stopped(
        lab, "shard truncated, above the limit", name, lambda: _truncate(lab, name, data),
        lambda: _copy_of_data(lab, name), data=str(data), stream={"max_lost": 0.0},
    )  # fmt: skip


def unwritable(lab: Lab, options: argparse.Namespace) -> Row:
    """A checkpoint cannot be written; then it can, and the run is resumed."""
    name = "unwritable"
    blocked = lab.folder / "runs" / name / "step-00000015"

    def block() -> str:
        at_step(name, 2)
        blocked.write_text("in the way")
        return "a checkpoint's folder cannot be made"

    return _stopped(lab, "storage not writable", name, block, blocked.unlink)


def full(lab: Lab, options: argparse.Namespace) -> Row:
    """The storage is full after two checkpoints; then there is room, and the run is resumed."""
    name, disk = "full", lab.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = shutil.which("mount") or "mount"
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=350m", "tmpfs", disk], check=True)
    try:
        return _stopped(
            lab, "storage full", name, lambda: "a disk of 350 MB holds two checkpoints of 130 MB",
            lambda: subprocess.run([mount, "-o", "remount,size=2g", disk], check=True), storage=str(disk),
        )  # fmt: skip
    finally:
        (lab.folder / "runs" / name).mkdir(parents=True, exist_ok=True)
        shutil.copytree(disk / name, lab.folder / "runs" / name, dirs_exist_ok=True)
        subprocess.run([shutil.which("umount") or "umount", disk], check=True)


def _stopped(lab: Lab, fault: str, name: str, harm: Callable[[], str], mend: Callable[[], Any], **changes: Any) -> Row:
    """A run that must stop with a reason, and goes on with `resume` once that is mended."""
    from jem.config import PretrainConfig
    from jem.errors import RunError
    from pipelines.pretrain import pretrain

    reason = ""
    began = time.monotonic()
    try:
        run_with(lab, name, harm, **changes)
    except RunError as error:
        reason = str(error)
    seconds = time.monotonic() - began
    assert reason, "it did not stop"
    mend()
    storage = changes.get("storage", str(lab.folder / "runs"))
    pretrain(PretrainConfig.model_validate({"resume": name, "storage": storage, "track": {"uri": lab.server.uri}}))
    if "storage" in changes:
        shutil.copytree(Path(storage) / name, lab.folder / "runs" / name, dirs_exist_ok=True)
    row = finished(lab, fault, name, "", seconds)
    row.happened = f"stopped: “{reason[:160]}…”; mended and resumed{row.happened}"
    return row


def grown(lab: Lab, options: argparse.Namespace) -> Row:
    """An elastic run begins on one node, grows when one joins, and shrinks when one is lost."""
    name = "grown"
    if len(lab.nodes) > 1:
        lab.lose_node(lab.nodes[-1])

    def harm() -> str:
        at_step(name, 8)
        lab.add_node()
        until(lambda: any(note["world"] == 2 for note in notes_of(name)))
        grew = min(note["step"] for note in notes_of(name) if note["world"] == 2)
        at_step(name, grew + 12)
        lab.lose_node(lab.nodes[0])
        until(lambda: len({note["start"] for note in notes_of(name) if note["world"] == 1}) > 1)
        starts = sorted({note["start"] for note in notes_of(name) if note["world"] == 1})
        shrank = min(note["step"] for note in notes_of(name) if note["start"] == starts[-1])
        return f"1 worker; a node joined: 2 from step {grew} on; a node lost: 1 from step {shrank} on"

    cluster = {"min_workers": 1, "resize_seconds": 3}
    happened, seconds = run_with(lab, name, harm, train={"epochs": LONG, "checkpoint_every": 10}, cluster=cluster)
    row = finished(lab, "node added, then lost; elastic", name, happened, seconds, LONG_STEPS)
    lab.add_node()
    return row


def resized(lab: Lab, options: argparse.Namespace) -> Row:
    """Stopped with two workers, resumed with one."""
    from jem.config import PretrainConfig
    from pipelines.pretrain import pretrain

    name = "resized"
    source = lab.folder / "runs" / "undisturbed"
    target = lab.folder / "runs" / name
    began = time.monotonic()
    code = "import sys; from jem.config import PretrainConfig; from pipelines.pretrain import pretrain; "
    code += "pretrain(PretrainConfig.model_validate_json(sys.argv[1]))"
    config = lab.config(name, cluster={"address": lab.cluster.address})
    driver = subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], cwd=lab.folder)
    assert source.exists()
    until((target / "step-00000015" / "state.pt").exists)
    time.sleep(0.5)
    driver.kill()
    driver.wait(30)
    changes = {"resume": name, "storage": str(lab.folder / "runs"), "cluster": {"workers": 1}}
    pretrain(PretrainConfig.model_validate(changes | {"track": {"uri": lab.server.uri}}))
    return finished(lab, "driver killed, resumed with 1 worker of 2", name, "went on", time.monotonic() - began)


def pressed(lab: Lab, options: argparse.Namespace) -> Row:
    """The object store is nearly full of something else, and batches are 60 times as large."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    class Holder:
        def __init__(self) -> None:
            self.held = [ray.put(np.zeros(20 * 2**20, np.uint8)) for _ in range(8)]

        def ready(self) -> None:
            pass

    holders = [
        Holder.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()
        for node in lab.nodes
    ]
    ray.get([holder.ready.remote() for holder in holders], timeout=60)
    _, seconds = run_with(lab, "pressed", None, stream={"canvas": 256})
    row = finished(lab, "object store 80 % full, batches of 12 MB", "pressed", "it spills and goes on", seconds)
    row.equal = "-"
    return row


FAULTS: dict[str, Callable[[Lab, argparse.Namespace], Row]] = {
    "undisturbed": undisturbed,
    "truncated": truncated,
    "over": over_the_limit,
    "unwritable": unwritable,
    "full": full,
    "resized": resized,
    "pressed": pressed,
    "undisturbed-long": undisturbed_long,
    "kills": kills,
    "drained": drained,
    "terminated": terminated,
    "mlflow": mlflow_away,
    "grown": grown,
}


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| fault | what happened | what was lost | s | weights as undisturbed |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {row.fault} | {row.happened} | {row.lost} | {row.seconds:.0f} | {row.equal} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--folder", type=Path, help="kept, and used again: the undisturbed runs are made once")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--away", type=int, default=60, help="seconds without MLflow")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="jem-faults-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with lab(folder) as made:
        for name in options.only:
            if name.startswith("undisturbed") and (folder / "runs" / name / "run.json").exists():
                continue
            print(f"{name} ...", flush=True)
            try:
                rows.append(FAULTS[name](made, options))
            except Exception as error:  # noqa: BLE001 - the other faults are to be seen too
                rows.append(Row(name, f"FAILED: {error!r:.300}", "?", 0, "?"))
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(any(row.happened.startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
