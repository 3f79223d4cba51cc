"""Launches the loop on Ray Train: workers, their streams, checkpoints in storage, and news for the driver."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState
from ray.train.v2.api.config import (  # mypy takes those of ray.train for Train V1's
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jem.augment.views import Augment, generator, prefetched
from jem.batch import Batch, Views
from jem.config import AugmentConfig
from jem.data.cache import cached_batches
from jem.data.plan import Plan, Position
from jem.data.read import Told
from jem.data.stream import ray_batches, views_batches
from jem.device import put, use_cpu
from jem.errors import InputError, RetryError, RunError
from jem.methods import build_method
from jem.progress import Progress
from jem.train import checkpoint
from jem.train.checkpoint import State
from jem.train.elastic import Divisors, ElasticTrainer
from jem.train.job import Job, Trained
from jem.train.loop import Phase, fit
from jem.train.mailbox import Mailbox
from jem.train.news import ANSWER_SECONDS, FLUSH_SECONDS, Announced, Losses, News, OnTerm
from jem.train.online import OnlineKNN
from jem.train.profile import Profile

POLL_SECONDS = 0.5
START_FAILURES = 10
"""Starts of the workers that may fail where any number of them may die: each may take `cluster.start_timeout`."""
CLOSE_SECONDS = 60.0
"""Wait of a finished training for an MLflow that is away."""
ABORT_SECONDS = 5.0


class _Told(ControllerCallback):
    """Gives the mailbox the handle of Ray Train's controller, and says why the workers start again.

    `fit()` keeps the handle to itself, and the controller alone ends a training: without it the workers and their
    placement group would outlive a driver that stops early and lives on (ray #54305).
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller's process."""
        del train_run_context
        ray.get(self._mailbox.led_by.remote(ray.get_runtime_context().current_actor), timeout=ANSWER_SECONDS)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called in the controller's process."""
        del previous_state
        if isinstance(current_state, RestartingState | ReschedulingState):
            why = _cause(current_state.training_failed_error)
            self._mailbox.put.remote("say", f"the workers start again, from the last checkpoint: {why}")


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
    # with the driver, so that no other node takes it along
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Mailbox)
    mailbox: Any = actor.options(scheduling_strategy=here).remote()
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.start_timeout)
    trainer = _trainer(job, mailbox)
    total = job.plan().total_steps(config.train.epochs) * config.train.batch_size
    try:
        with _telling(mailbox, Progress(f"pretrain {job.name}", total), save, epoch):
            result = _fit(trainer, mailbox, stop)
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
                max_failures=cluster.max_failures,
                controller_failure_limit=START_FAILURES if cluster.max_failures < 0 else cluster.max_failures,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            callbacks=[OnTerm(), _Told(mailbox)],  # type: ignore[list-item]
        ),
    }
    if cluster.min_workers is None:
        return TorchTrainer(_worker, **arguments)
    beside = config.stream.decode_cpus + config.augment.cpus_beside
    policy = Divisors(scaling, config.worlds, beside, cluster.start_timeout, mailbox)
    return ElasticTrainer(_worker, policy=policy, **arguments)


def _fit(trainer: TorchTrainer, mailbox: Any, stop: threading.Event | None) -> Any:
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


def _worker(arguments: dict[str, Any]) -> Any:
    """One train worker, from its start (or start again) to the end of the run; returns {"failure": why}, or {}."""
    job: Job = arguments["job"]
    mailbox: Any = arguments["mailbox"]
    failure = _fatal(mailbox)
    if failure:
        return {"failure": failure}
    news = News(job, mailbox)
    patience = FLUSH_SECONDS
    try:
        _train(job, news, Announced(news, mailbox), Losses(job, mailbox) if job.config.stream.max_lost else None)
        patience = CLOSE_SECONDS
    except RetryError:
        raise
    except (InputError, RunError) as error:
        ray.get(mailbox.give_up.remote(str(error)), timeout=ANSWER_SECONDS)
        raise
    finally:
        news.close(patience)
    return {}


def _train(job: Job, news: News, notice: Announced, told: Told | None) -> None:
    config, context = job.config, ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        use_cpu(int(cores * job.share) // context.get_local_world_size())
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
