"""The training loop, in torch alone: Ray Train launches it, and a test can run it in a plain process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jem import distributed
from jem.ahead import gap
from jem.batch import Views
from jem.config import PretrainConfig
from jem.data.plan import Plan, Position
from jem.methods.base import Method, Progress, StepOutput
from jem.models.backbones import Backbone
from jem.train.checkpoint import State
from jem.train.optimizers import build_optimizer, restore, set_rates
from jem.train.profile import Profile
from jem.train.schedules import learning_rate, scaled_lr, weight_decay
from jem.train.watch import Reporter, Summary, Watch

Source = Callable[[Position], Iterator[Views]]
"""Gives the views of this worker's batches from a position on, to the end of the run."""
Phase = Callable[[str], contextlib.AbstractContextManager[object]]
"""Makes what a part of a step is run in, by the names of `jem.train.profile.PHASES`."""


class Notice(Protocol):
    """Asks for a checkpoint at once."""

    def given(self) -> bool:
        """Whether one is wanted. Each rank is asked when it tells its metrics; one that wants it is enough."""

    def keep(self, state: State | None, step: int, summary: Summary) -> None:
        """As a `Keeper`, but returns when the state is safe."""


class Keeper(Protocol):
    """Where checkpoints go."""

    def __call__(self, state: State | None, step: int, summary: Summary) -> None:
        """Keep `state` and what is known at `step`. All ranks call it after the same step; only rank 0 has a state."""


def fit(
    config: PretrainConfig,
    method: Method,
    source: Source,
    plan: Plan,
    reporter: Reporter,
    keep: Keeper,
    *,
    device: torch.device,
    state: State | None = None,
    judge: Callable[[Method], dict[str, float]] | None = None,
    profile: Profile | None = None,
    notice: Notice | None = None,
) -> None:
    """Train `method` in place, from the beginning or from `state`, to the last epoch.

    Every rank calls it with its own `source`; on several ranks torch.distributed is initialised. `judge` (such as an
    online kNN) is called on all ranks together at the end of an epoch, every `evaluation.online.every` epochs. A
    `profile` measures some of this rank's steps, and changes nothing. A `notice`, on all ranks or none, may ask for a
    checkpoint in between.

    Raises:
        RunError: A term of the loss is not finite.
    """
    train, schedule = config.train, config.schedule
    peak = scaled_lr(config.optimizer.lr, train.batch_size, schedule.scale_lr)
    total, warmup = plan.total_steps(train.epochs), round(schedule.warmup_epochs * plan.steps(0))
    mine = distributed.rank() == 0

    wrapped = _prepare(method, config, device)
    optimizer = build_optimizer(method, config.optimizer, peak)
    first = 0
    if state is not None:
        method.load_state_dict(state.model)
        restore(optimizer, state.optimizer)
        first = state.step

    # a CPU has done a step when it returns
    late = device.type == "cuda"
    given = None if notice is None else notice.given
    watch = Watch(train, reporter, first, scaled=method.config.traits.scaled, late=late, given=given)
    following = source(plan.position(first))
    phase = contextlib.nullcontext if profile is None else profile.phase
    for step in range(first, total) if profile is None else profile.steps(range(first, total)):
        epoch, within = plan.position(step)
        with watch.waiting(), phase("wait"):
            views = next(following)
        lr = learning_rate(step, total=total, peak=peak, warmup=warmup, decay=schedule.decay, final=schedule.final)
        decay = weight_decay(step, total=total, start=config.optimizer.weight_decay, final=schedule.final_weight_decay)
        set_rates(optimizer, lr, peak, decay)
        # Whatever a method draws belongs to this step alone, so that a resumed run draws the same.
        torch.manual_seed(_seed(config.seed, epoch, within, distributed.rank()))
        progress = Progress(step, total, epoch, within == 0, config.seed)
        output = _step(wrapped, method, optimizer, views, plan, config, device, progress, phase)
        done = step + 1
        method.after_step(replace(progress, step=done))

        last = within + 1 == plan.steps(epoch)
        watch.step(output, train.batch_size, done, {"lr": lr, "weight_decay": decay}, last=last)
        if last:
            with phase("keep"):
                judged = judge(method) if judge and _judged(config, epoch) else {}
            watch.epoch(epoch, train.epochs, done, judged)
        due = last if train.checkpoint_every is None else done % train.checkpoint_every == 0
        noticed = watch.noticed()
        if due or noticed or done == total:
            watch.check(lr)
            with phase("keep"):
                put = notice.keep if notice is not None and noticed else keep
                put(_state(method, optimizer, done, plan.parts) if mine else None, done, watch.summary())


def _prepare(method: Method, config: PretrainConfig, device: torch.device) -> nn.Module:
    """Put the method on its device, and wrap it for DDP where there are several workers."""
    train = config.train
    method.to(device=device)
    if train.channels_last:
        method.to(memory_format=torch.channels_last)
    if train.sync_bn and distributed.world() > 1:
        distributed.convert_sync_batchnorm(method)
    for module in method.modules():
        if isinstance(module, Backbone):
            module.joint = module.joint or train.joint_views
            if train.compile:
                module.compile()
    if distributed.world() == 1:
        return method
    # Without synchronised batch norm, rank 0's running statistics are everybody's, as they are in its checkpoint.
    return DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=not train.sync_bn,
        gradient_as_bucket_view=True,
    )


def _step(
    wrapped: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    views: Views,
    plan: Plan,
    config: PretrainConfig,
    device: torch.device,
    progress: Progress,
    phase: Phase = contextlib.nullcontext,
) -> StepOutput:
    """Forward and backward in `train.accumulate` parts, and the optimizer's step; the output is of the last part."""
    train = config.train
    method.train()
    method.before_step(progress)
    output: StepOutput
    for index, part in enumerate(_split(views, train.accumulate, plan.parts // plan.world), start=1):
        sums = index < train.accumulate and isinstance(wrapped, DistributedDataParallel)
        with cast("DistributedDataParallel", wrapped).no_sync() if sums else contextlib.nullcontext():
            with phase("forward"), torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                output = wrapped(part)
            with phase("backward"), gap():  # autograd runs without Python
                torch.autograd.backward(output.loss / train.accumulate)
    with phase("optimizer"):
        method.after_backward(progress)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(method.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return output


def _judged(config: PretrainConfig, epoch: int) -> bool:
    online = config.evaluation.online
    return online is not None and ((epoch + 1) % online.every == 0 or epoch + 1 == config.train.epochs)


def _seed(*coordinates: int) -> int:
    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)


def _split(views: Views, passes: int, parts: int) -> Iterator[Views]:
    """What each forward pass gets: its share of each of this worker's parts, so that it is the same on any number."""
    if passes == 1:
        yield views
        return

    def split(whole: Tensor) -> list[Tensor]:
        shares = [part.chunk(passes) for part in whole.chunk(parts)]
        return [torch.cat(share) if parts > 1 else share[0] for share in zip(*shares, strict=True)]

    ids, labels = split(views.id), split(views.label)
    images = [split(view) for view in views.views]
    masks = [None if mask is None else split(mask) for _, mask in views]
    for number in range(passes):
        yield Views(
            [each[number] for each in images],
            ids[number],
            labels[number],
            [None if each is None else each[number] for each in masks],
        )


def _state(method: Method, optimizer: torch.optim.Optimizer, step: int, parts: int) -> State:
    """A copy on the CPU, which the next step does not change."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list) else value

    return State(copy(dict(method.state_dict())), copy(optimizer.state_dict()), step, parts)
