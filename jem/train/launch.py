"""Launches the loop on Ray Train: workers, their streams, checkpoints in storage, and news for the driver."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.config import FailureConfig  # mypy takes ray.train's for that of Train V1

from jem.augment.views import Augment, generator, prefetched
from jem.batch import Batch, Views
from jem.config import AugmentConfig, PretrainConfig
from jem.data.cache import Cache, cached_batches
from jem.data.index import Index
from jem.data.plan import Plan, Position
from jem.data.stream import ray_batches, views_batches
from jem.device import put
from jem.errors import InputError, RunError
from jem.methods import build_method
from jem.progress import Progress
from jem.tracking.runs import MetricLog
from jem.train import checkpoint
from jem.train.checkpoint import State
from jem.train.loop import Phase, fit
from jem.train.online import OnlineKNN
from jem.train.profile import TABLE, TRACE, Measured, Profile
from jem.train.watch import Summary

POLL_SECONDS = 0.5
ANSWER_SECONDS = 30.0
FLUSH_SECONDS = 10.0
ABORT_SECONDS = 5.0


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

    def plan(self) -> Plan:
        """The order of the images."""
        config = self.config
        return Plan(
            self.index.rows,
            config.seed,
            config.train.batch_size,
            config.cluster.workers,
            config.stream.window,
            config.stream.remainder,
        )


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    state: State
    summary: Summary
    checkpoint: str
    """Where the last checkpoint is."""


class Mailbox:
    """An actor that carries the workers' news to the driver, and the reason why a run must not be tried again."""

    def __init__(self) -> None:
        self._news: deque[tuple[str, Any]] = deque(maxlen=10_000)
        self._fatal: str | None = None
        self._controller: Any = None

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

    def led_by(self, controller: Any) -> None:
        """Note the handle of Ray Train's controller."""
        self._controller = controller

    def controller(self) -> Any:
        """The handle of Ray Train's controller; None before it has begun."""
        return self._controller


class _Found(ControllerCallback):
    """Gives the mailbox the handle of Ray Train's controller, which `fit()` keeps to itself: it alone ends a training.

    Without it the workers and their placement group would outlive a driver that stops early and lives on (ray #54305).
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller's process."""
        del train_run_context
        ray.get(self._mailbox.led_by.remote(ray.get_runtime_context().current_actor), timeout=ANSWER_SECONDS)


def train(
    job: Job,
    save: Callable[[str, bytes], None],
    epoch: Callable[[dict[str, float]], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Trained:
    """Run the training on the Ray cluster that this process is connected to, or go on with it.

    It goes on where `job.storage`/`job.name` holds a checkpoint. `save` gets the name and the content of each file that
    the workers make, as they make it: those of the profile. `epoch` gets an epoch's latest metrics at its end. Setting
    `stop` ends the training, which can go on later.

    Raises:
        RunError: It could not finish; the message says why. The last checkpoint is kept.
    """
    config = job.config
    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.start_timeout)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job, "mailbox": mailbox},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if job.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=job.gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1} if job.gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=job.storage,
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=max(config.cluster.max_failures, 0)
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            callbacks=[_Found(mailbox)],  # type: ignore[list-item]  # as FailureConfig
        ),
    )
    total = job.plan().total_steps(config.train.epochs) * config.train.batch_size
    try:
        with _telling(mailbox, Progress(f"pretrain {job.name}", total), save, epoch):
            result = _fit(trainer, mailbox, stop)
        failure = (result.return_value or {}).get("failure")
    except ray.train.TrainingFailedError as error:
        failure = _fatal(mailbox) or _cause(error)
        raise RunError(f"training stopped: {failure}. Mend the cause, then go on with --resume {job.name}") from error
    finally:
        ray.kill(mailbox)
    if failure or result.checkpoint is None:
        raise RunError(f"training stopped: {failure or 'there is no checkpoint'}")
    with result.checkpoint.as_directory() as folder:
        state = checkpoint.load(Path(folder))
    return Trained(state, dict(result.metrics or {}), result.checkpoint.path)


def _fit(trainer: ray.train.torch.TorchTrainer, mailbox: Any, stop: threading.Event | None) -> Any:
    """`trainer.fit()` in a thread: in the main one it takes SIGINT for itself, and ends the process with status 0.

    Raises:
        RunError: `stop` was set.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()  # an interrupted join() takes the thread for dead, before Python 3.12

    def run() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="jem-fit").start()
    try:
        while not done.wait(POLL_SECONDS):  # without a limit, signals would wait for the end
            if stop is not None and stop.is_set():
                raise RunError("stopped")
    finally:
        # a signal's process is about to end, and has few seconds to say so elsewhere: it does not wait
        _end(mailbox, running=not done.is_set(), wait=stop is not None and stop.is_set())
    if failure:
        raise failure[0]
    return outcome[0]


def _end(mailbox: Any, *, running: bool, wait: bool) -> None:
    """End the workers, if they run, give back what they held, and then the controller; the checkpoints stay."""
    with contextlib.suppress(RayError):  # whatever is gone already need not be ended
        controller = ray.get(mailbox.controller.remote(), timeout=ABORT_SECONDS)
        if controller is None:
            return
        if running:
            ended = controller.abort.remote()
            if not wait:
                return
            with contextlib.suppress(RayError):  # it ends itself, which is an error
                ray.get(ended, timeout=ABORT_SECONDS)
        ray.kill(controller)  # left to itself, the exit of one in some forty hung for good, with 1 GB (Ray 2.60)


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
def _telling(
    mailbox: Any,
    progress: Progress,
    save: Callable[[str, bytes], None],
    epoch: Callable[[dict[str, float]], None],
) -> Iterator[None]:
    """Shows the workers' news, saves their files and passes on their epochs, while the block runs."""
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
                elif kind == "epoch":
                    epoch(value)
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
        self._mailbox = mailbox
        self._mine = ray.train.get_context().get_world_rank() == 0
        self._log = MetricLog(job.tracking_uri, job.run_id) if self._mine else None
        self._latest: dict[str, float] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        if self._log is not None:
            self._log.log(values, step)
            self._latest |= values
            if "epoch" in values:
                self._mailbox.put.remote("epoch", self._latest)
                self._latest = {}

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

    def at(self, step: int, images: int) -> None:
        """The run goes on from a checkpoint."""
        if self._mine:
            self._mailbox.put.remote("at", images)
            self.say(f"going on from step {step}")

    def keep(self, state: State | None, step: int, summary: Summary) -> None:
        """Hand a checkpoint to Ray Train, which uploads it in the background. All ranks call it."""
        name = f"step-{step:08d}"
        if state is None:
            ray.train.report(summary, checkpoint=None, checkpoint_dir_name=name)
            return
        if self._log is not None:
            # What comes before the checkpoint is not repeated by a run that goes on from it.
            self._log.flush(FLUSH_SECONDS)
        folder = Path(tempfile.mkdtemp(prefix="jem-checkpoint-"))
        checkpoint.save(state, folder)
        ray.train.report(
            summary,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def close(self) -> None:
        if self._log is not None:
            self._log.close(FLUSH_SECONDS)


def _worker(arguments: dict[str, Any]) -> Any:
    """One train worker, from its start (or start again) to the end of the run; returns {"failure": why}, or {}."""
    job: Job = arguments["job"]
    mailbox: Any = arguments["mailbox"]
    failure = _fatal(mailbox)
    if failure:
        return {"failure": failure}
    news = _News(job, mailbox)
    try:
        _train(job, news)
    except (InputError, RunError) as error:
        ray.get(mailbox.give_up.remote(str(error)), timeout=ANSWER_SECONDS)
        raise
    finally:
        news.close()
    return {}


def _train(job: Job, news: _News) -> None:
    config, context = job.config, ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, int(cores * job.share) // context.get_local_world_size()))
    torch.manual_seed(config.seed)
    method = build_method(config.method, config.backbone, job.classes, len(job.index))
    state = _restore(job)
    if state is not None:
        news.at(state.step, state.step * config.train.batch_size)
    labelled = job.index.label_column is not None
    judge = OnlineKNN(config, job.index, job.test, device) if labelled and config.evaluation.online else None

    profile = None
    if config.profile and context.get_world_rank() == 0:
        profile = Profile(device, news.profile, pooled=config.augment.placement == "pool")
    phase = contextlib.nullcontext if profile is None else profile.phase

    def source(start: Position) -> Iterator[Views]:
        return _views(job, context.get_world_rank(), start, device, phase)

    plan = job.plan()
    fit(config, method, source, plan, news, news.keep, device=device, state=state, judge=judge, profile=profile)


def _views(job: Job, rank: int, start: Position, device: torch.device, phase: Phase) -> Iterator[Views]:
    """This worker's views from `start` to the end of the run."""
    config, plan = job.config, job.plan()
    mine = (job.index, plan, config.stream, rank, start, config.train.epochs)
    if config.augment.placement == "pool":
        make = partial(_PoolAugment, config.augment, config.seed, rank)
        for views in views_batches(*mine, decode_tasks=job.decode_tasks, augment=config.augment, make=make):
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
        batches = ray_batches(*mine, decode_tasks=job.decode_tasks, pin_memory=pin)
    positions = plan.positions(start, config.train.epochs)
    generators = (generator(config.seed, *position, rank) for position in positions)
    # what autocast would make of them in the first layer; half of the memory to write and to read
    dtype = torch.bfloat16 if device.type == "cuda" and config.train.precision == "bf16" else torch.float32
    for _, views in prefetched(batches, generators, Augment(config.augment), device, dtype, phase):
        yield views


class _PoolAugment:
    """Makes the views in an actor of the pool, with the parameters that the training device would have drawn."""

    def __init__(self, config: AugmentConfig, seed: int, rank: int) -> None:
        self._augment, self._seed, self._rank = Augment(config), seed, rank
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: Batch, position: Position) -> Views:
        moved = Batch(batch.image.to(self._device), batch.size, batch.id, batch.label)
        return self._augment(moved, generator(self._seed, *position, self._rank))


def _restore(job: Job) -> State | None:
    """The state of the run's last checkpoint.

    Raises:
        InputError: It was made by another number of workers, among which the epoch was divided otherwise.
    """
    kept = ray.train.get_checkpoint()
    if kept is None:
        return None
    with kept.as_directory() as folder:
        state = checkpoint.load(Path(folder))
    if state.world != job.config.cluster.workers:
        raise InputError(
            f"the checkpoint is of {state.world} workers, not {job.config.cluster.workers}: go on with as many"
        )
    return state
