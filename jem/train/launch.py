"""Launches the loop on Ray Train: workers, their streams, checkpoints in storage, and news for the driver."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.config import (  # mypy takes those of ray.train for Train V1's
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.api.preemption import PreemptionInfo
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jem.augment.views import Augment, generator, prefetched
from jem.batch import Batch, Views
from jem.config import AugmentConfig, PretrainConfig
from jem.data.cache import Cache, cached_batches
from jem.data.index import Index
from jem.data.plan import Plan, Position
from jem.data.read import Told, why_lost
from jem.data.storage import one_line
from jem.data.stream import ray_batches, views_batches
from jem.device import put
from jem.errors import InputError, RetryError, RunError
from jem.methods import build_method
from jem.progress import Progress
from jem.tracking.runs import MetricLog
from jem.train import checkpoint
from jem.train.checkpoint import State
from jem.train.elastic import Divisors, ElasticTrainer
from jem.train.loop import Phase, fit
from jem.train.online import OnlineKNN
from jem.train.profile import TABLE, TRACE, Measured, Profile
from jem.train.watch import Summary

POLL_SECONDS = 0.5
ANSWER_SECONDS = 30.0
FLUSH_SECONDS = 10.0
CLOSE_SECONDS = 60.0
"""Wait of a finished training for an MLflow that is away."""
UPLOAD_TRIES, UPLOAD_PAUSE = 4, 1.0
"""Of a checkpoint; seconds before the second try, then twice as many each time."""
GRACE_SECONDS = 30.0
"""Between SIGTERM to a worker and its end, as Kubernetes has it."""


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


class Mailbox:
    """An actor that carries the workers' news to the driver, and the reason why a run must not be tried again.

    And the wish for a checkpoint before the number of workers changes, to rank 0, and its answer; and the images that
    could not be read.
    """

    def __init__(self) -> None:
        self._news: deque[tuple[str, Any]] = deque(maxlen=10_000)
        self._fatal: str | None = None
        self._wishes, self._answered = 0, 0
        self._lost: set[int] = set()
        self._lost_shards: set[str] = set()

    def put(self, kind: str, value: Any) -> None:
        """Add one piece of news."""
        self._news.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        """All news since the last call."""
        news, self._news = list(self._news), deque(maxlen=10_000)
        return news

    def give_up(self, reason: str) -> None:
        """Let no worker begin again."""
        self._fatal = self._fatal or reason

    def fatal(self) -> str | None:
        """Why no worker may begin again."""
        return self._fatal

    def want(self, workers: int) -> int:
        """Wish for a checkpoint, to go on with so many workers; returns the number of the wish."""
        self.put("say", f"the cluster has room for {workers} workers: keeping a checkpoint, then going on with them")
        self._wishes += 1
        return self._wishes

    def state(self) -> tuple[int, int]:
        """The number of the latest wish, and of the images that were lost."""
        return self._wishes, len(self._lost)

    def answer(self, wish: int) -> None:
        """A checkpoint is kept since that wish."""
        self._answered = wish

    def answered(self) -> int:
        """The latest wish since which a checkpoint is kept."""
        return self._answered

    def lose(self, positions: list[int], shards: dict[str, str]) -> int:
        """Note images that cannot be read, and why each shard's cannot; returns how many there are by now."""
        for name in shards.keys() - self._lost_shards:
            self._lost_shards.add(name)
            self.put("say", f"warning: {shards[name]}; other images stand in for those that are lost")
        self._lost.update(positions)
        return len(self._lost)


def train(job: Job, save: Callable[[str, bytes], None]) -> Trained:
    """Run the training on the Ray cluster that this process is connected to, or go on with it.

    It goes on where `job.storage`/`job.name` holds a checkpoint. `save` gets the name and the content of each file that
    the workers make, as they make it: those of the profile.

    Raises:
        RunError: It could not finish; the message says why. The last checkpoint is kept.
    """
    config = job.config
    # with the driver, so that no other node takes it along
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Mailbox)
    mailbox: Any = actor.options(scheduling_strategy=here).remote()
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.start_timeout)
    trainer = _trainer(job, mailbox)
    total = job.plan().total_steps(config.train.epochs) * config.train.batch_size
    try:
        with _telling(mailbox, Progress(f"pretrain {job.name}", total), save):
            result = _fit(trainer)
        failure = (result.return_value or {}).get("failure")
    except ray.train.TrainingFailedError as error:
        raise _stopped(job, _fatal(mailbox) or _cause(error)) from error
    finally:
        ray.kill(mailbox)
    if failure or result.checkpoint is None:
        raise _stopped(job, failure or "there is no checkpoint")
    with result.checkpoint.as_directory() as folder:
        state = checkpoint.load(Path(folder))
    return Trained(state, dict(result.metrics or {}), result.checkpoint.path)


def _stopped(job: Job, why: str) -> RunError:
    return RunError(f"training stopped: {why}. Mend the cause, then go on with --resume {job.name}")


def _trainer(job: Job, mailbox: Any) -> TorchTrainer:
    config, cluster = job.config, job.config.cluster
    scaling = ScalingConfig(
        num_workers=cluster.workers if cluster.min_workers is None else (cluster.min_workers, cluster.workers),
        use_gpu=job.gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if job.gpu else {}),
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
    )
    arguments: dict[str, Any] = {
        "train_loop_config": {"job": job, "mailbox": mailbox},
        "torch_config": ray.train.torch.TorchConfig(backend="nccl" if job.gpu else "gloo"),
        "scaling_config": scaling,
        "run_config": RunConfig(
            name=job.name,
            storage_path=job.storage,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=max(cluster.max_failures, 0)
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            callbacks=[_OnTerm()],  # type: ignore[list-item]
        ),
    }
    if cluster.min_workers is None:
        return TorchTrainer(_worker, **arguments)
    beside = config.stream.decode_cpus + config.augment.cpus_beside
    policy = Divisors(scaling, config.worlds, beside, cluster.start_timeout, mailbox)
    return ElasticTrainer(_worker, policy=policy, **arguments)


class _OnTerm(WorkerCallback):
    """Takes SIGTERM to a train worker for what it means, as Ray Train takes the announced loss of a node.

    The workers keep a checkpoint, and are started again when the grace is over, if this one still lives then.
    """

    def after_init_train_context(self) -> None:
        """Called by Ray Train on each worker, in the main thread."""

        def note(*_: object) -> None:
            context = get_train_context()
            node = ray.get_runtime_context().get_node_id()
            deadline = int(1000 * (time.time() + GRACE_SECONDS))
            context.preemption_context.preemption_info = PreemptionInfo(deadline, {node: [context.get_world_rank()]})

        signal.signal(signal.SIGTERM, note)


def _fit(trainer: TorchTrainer) -> Any:
    """`trainer.fit()` in a thread: in the main one it takes SIGINT for itself, and ends the process with status 0."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="jem-fit")
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)  # without a limit, signals would wait for the end
    if failure:
        raise failure[0]
    return outcome[0]


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        # When one worker dies, the others fail because it is gone: its own reason says more.
        ranked = sorted(failures.values(), key=lambda each: not isinstance(each, RayActorError))
        error = ranked[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _fatal(mailbox: Any) -> str | None:
    try:
        reason: str | None = ray.get(mailbox.fatal.remote(), timeout=ANSWER_SECONDS)
    except RayError:
        return None
    return reason


@contextlib.contextmanager
def _telling(mailbox: Any, progress: Progress, save: Callable[[str, bytes], None]) -> Iterator[None]:
    """Shows the workers' news, and saves their files, while the block runs."""
    done = threading.Event()

    def show() -> None:
        while True:
            ended = done.wait(POLL_SECONDS)
            try:
                news = ray.get(mailbox.take.remote(), timeout=ANSWER_SECONDS)
            except RayError:
                return
            for kind, value in news:
                if kind == "say":
                    progress.say(value)
                elif kind == "at":
                    progress.at(value)
                elif kind == "file":
                    save(*value)
                else:
                    images, info = value
                    progress.update(images, **info)
            if ended:
                return

    thread = threading.Thread(target=show, daemon=True, name="jem-news")
    thread.start()
    try:
        with progress:
            try:
                yield
            finally:
                done.set()
                thread.join(2 * ANSWER_SECONDS)
    finally:
        done.set()


class _News:
    """What rank 0 tells: metrics to MLflow, progress and words to the driver. The other ranks are silent."""

    def __init__(self, job: Job, mailbox: Any) -> None:
        self._storage, self._mailbox = job.storage, mailbox
        self._mine = ray.train.get_context().get_world_rank() == 0
        self._log = MetricLog(job.tracking_uri, job.run_id, self.say) if self._mine else None
        self.lost = 0
        """Images that could not be read, so far."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        if self._log is not None:
            self._log.log(values | ({"stream/lost": self.lost} if self.lost else {}), step)

    def progress(self, images: int, info: dict[str, float]) -> None:
        if self._mine:
            shown = {key: f"{value:.0%}" if key == "waiting" else f"{value:.4g}" for key, value in info.items()}
            self._mailbox.put.remote("progress", (images, shown))

    def say(self, message: str) -> None:
        if self._mine:
            self._mailbox.put.remote("say", message)

    def profile(self, measured: Measured, trace: Path) -> None:
        """Where a step's time goes; the files are the driver's to save."""
        table = measured.table()
        for name, content in ((TABLE, f"{table}\n".encode()), (TRACE, trace.read_bytes())):
            # waited for, so that they are there before the run is over
            ray.get(self._mailbox.put.remote("file", (name, content)), timeout=ANSWER_SECONDS)
        self.say(f"where a step's time goes:\n{table}")

    def at(self, step: int, images: int, workers: int) -> None:
        """The run goes on from a checkpoint."""
        if self._mine:
            self._mailbox.put.remote("at", images)
            self.say(f"going on from step {step} with {workers} worker(s)")

    def keep(self, state: State | None, step: int, summary: Summary, *, wait: bool = False) -> None:
        """Hand a checkpoint to Ray Train, which uploads it in the background, unless to `wait`. All ranks call it."""
        name = f"step-{step:08d}"
        if state is None:
            ray.train.report(summary, checkpoint=None, checkpoint_dir_name=name)
            return
        if self._log is not None:
            # What comes before the checkpoint is not repeated by a run that goes on from it.
            self._log.flush(FLUSH_SECONDS)
        try:
            folder = Path(tempfile.mkdtemp(prefix="jem-checkpoint-"))
            checkpoint.save(state, folder)
        except OSError as error:
            raise RunError(f"{name} cannot be written to {tempfile.gettempdir()} ({one_line(error)})") from error
        ray.train.report(
            summary,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC
            if wait
            else ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, kept: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """As Ray Train does it; a storage that is full or gone ends the run, and is not tried with each restart."""
        storage = get_train_context().storage_context
        for attempt in range(UPLOAD_TRIES):
            try:
                return storage.persist_current_checkpoint(kept, name)
            except (OSError, RuntimeError, pa.ArrowException) as error:
                if attempt + 1 == UPLOAD_TRIES:
                    reason = f"{name} cannot be written to {self._storage} ({one_line(error)})"
                    ray.get(self._mailbox.give_up.remote(reason), timeout=ANSWER_SECONDS)
                    raise RunError(reason) from error
                time.sleep(UPLOAD_PAUSE * 2**attempt)
        raise AssertionError

    def close(self, seconds: float) -> None:
        """Wait so long for what MLflow has not yet; what it does not get is told."""
        if self._log is not None:
            self._log.close(seconds)


class _Notice:
    """Asks for a checkpoint at once: when the loss of a worker is announced, or their number is to change."""

    def __init__(self, news: _News, mailbox: Any) -> None:
        self._news, self._mailbox = news, mailbox
        self._context = get_train_context()
        # ray.train.get_preemption_info would be a meeting of all workers, which the loop has already
        self._announced: PreemptionInfo | None = None
        self._first = self._context.get_world_rank() == 0
        self._wish = self._answered = 0
        self._reply = mailbox.state.remote() if self._first else None

    def given(self) -> bool:
        """Whether it is wanted now. Never waits."""
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._wish, self._news.lost = ray.get(self._reply)
            self._reply = self._mailbox.state.remote()
        announced = self._context.preemption_context.preemption_info
        return announced != self._announced or self._wish > self._answered

    def keep(self, state: State | None, step: int, summary: Summary) -> None:
        """Keep a checkpoint, and return when it is stored."""
        announced = self._context.preemption_context.preemption_info
        self._news.keep(state, step, summary, wait=True)
        if announced is not None and announced != self._announced:
            self._news.say(f"a worker will be lost: a checkpoint of step {step} is kept")
        self._announced, self._answered = announced, self._wish
        if self._first:
            self._mailbox.answer.remote(self._answered)


class _Losses:
    """Counts the images that this worker could not get, with the others' and up to the limit."""

    def __init__(self, job: Job, mailbox: Any) -> None:
        self._job, self._mailbox = job, mailbox
        self._known: set[int] = set()
        self._shards: dict[str, str] = {}

    def __call__(self, positions: NDArray[np.int64]) -> None:
        """Count those at these positions, once each, whatever the epoch.

        Raises:
            RunError: There are too many.
        """
        new = set(positions.tolist()) - self._known
        if not new:
            return
        index, stream = self._job.index, self._job.config.stream
        shards: dict[str, str] = {}
        for position in new:
            name = index.files[index.file[np.searchsorted(index.start, position, side="right") - 1]]
            if name not in self._shards:
                self._shards[name] = shards[name] = why_lost(index, position, stream.canvas, stream.pixel_limit)
        self._known |= new
        total: int = ray.get(self._mailbox.lose.remote(sorted(new), shards), timeout=ANSWER_SECONDS)
        if total > stream.max_lost * len(index):
            raise RunError(
                f"{total} of {len(index)} images are lost, more than stream.max_lost {stream.max_lost:g} allows: "
                f"{self._shards[name]}"
            )


def _worker(arguments: dict[str, Any]) -> Any:
    """One train worker, from its start (or start again) to the end of the run; returns {"failure": why}, or {}."""
    job: Job = arguments["job"]
    mailbox: Any = arguments["mailbox"]
    failure = _fatal(mailbox)
    if failure:
        return {"failure": failure}
    news = _News(job, mailbox)
    patience = FLUSH_SECONDS
    try:
        _train(job, news, _Notice(news, mailbox), _Losses(job, mailbox) if job.config.stream.max_lost else None)
        patience = CLOSE_SECONDS
    except RetryError:
        raise
    except (InputError, RunError) as error:
        ray.get(mailbox.give_up.remote(str(error)), timeout=ANSWER_SECONDS)
        raise
    finally:
        news.close(patience)
    return {}


def _train(job: Job, news: _News, notice: _Notice, told: Told | None) -> None:
    config, context = job.config, ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // context.get_local_world_size()))
    torch.manual_seed(config.seed)
    method = build_method(config.method, config.backbone, job.classes, len(job.index))
    state = _restore(job)
    if state is not None:
        news.at(state.step, state.step * config.train.batch_size, world)
    labelled = job.index.label_column is not None
    judge = OnlineKNN(config, job.index, job.test, device) if labelled and config.evaluation.online else None

    profile = None
    if config.profile and rank == 0:
        profile = Profile(device, news.profile, pooled=config.augment.placement == "pool")
    phase = contextlib.nullcontext if profile is None else profile.phase

    plan = job.plan(world)

    def source(start: Position) -> Iterator[Views]:
        return _views(job, plan, rank, start, device, phase, told)

    fit(
        config,
        method,
        source,
        plan,
        news,
        news.keep,
        device=device,
        state=state,
        judge=judge,
        profile=profile,
        notice=notice,
    )


def _views(
    job: Job, plan: Plan, rank: int, start: Position, device: torch.device, phase: Phase, told: Told | None
) -> Iterator[Views]:
    """This worker's views from `start` to the end of the run."""
    config = job.config
    mine = (job.index, plan, config.stream, rank, start, config.train.epochs)
    parts = plan.parts_of(rank)
    if config.augment.placement == "pool":
        make = partial(_PoolAugment, config.augment, config.seed, parts)
        tasks = job.decode_tasks
        for views in views_batches(*mine, decode_tasks=tasks, augment=config.augment, make=make, told=told):
            with phase("copy"):
                moved = Views(
                    [put(view, device) for view in views.views],
                    put(views.id, device),
                    put(views.label, device),
                    views.masks and [None if mask is None else put(mask, device) for mask in views.masks],
                )
            yield moved
        return
    pin = device.type == "cuda"
    if job.cache is not None:
        batches = cached_batches(*mine, cache=job.cache, pin_memory=pin)
    else:
        batches = ray_batches(*mine, decode_tasks=job.decode_tasks, pin_memory=pin, told=told)
    positions = plan.positions(start, config.train.epochs)
    generators = ([generator(config.seed, *position, part) for part in parts] for position in positions)
    # what autocast would make of them in the first layer; half of the memory to write and to read
    dtype = torch.bfloat16 if device.type == "cuda" and config.train.precision == "bf16" else torch.float32
    for _, views in prefetched(batches, generators, Augment(config.augment), device, dtype, phase):
        yield views


class _PoolAugment:
    """Makes the views in an actor of the pool, with the parameters that the training device would have drawn."""

    def __init__(self, config: AugmentConfig, seed: int, parts: range) -> None:
        self._augment, self._seed, self._parts = Augment(config), seed, parts
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: Batch, position: Position) -> Views:
        moved = Batch(batch.image.to(self._device), batch.size, batch.id, batch.label)
        return self._augment(moved, [generator(self._seed, *position, part) for part in self._parts])


def _restore(job: Job) -> State | None:
    """The state of the run's last checkpoint.

    Raises:
        InputError: It is of epochs that were cut into another number of parts.
    """
    kept = ray.train.get_checkpoint()
    if kept is None:
        return None
    with kept.as_directory() as folder:
        state = checkpoint.load(Path(folder))
    if state.parts != job.config.parts:
        raise InputError(
            f"the checkpoint is of epochs in {state.parts} parts, not {job.config.parts}: go on with "
            f"--train.parts {state.parts}"
        )
    return state
