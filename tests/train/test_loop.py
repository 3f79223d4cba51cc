"""The loop in plain processes: what it tells, what it keeps, and that going on is as good as not having stopped."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from jem import distributed
from jem.augment.views import Augment, generator, prefetched
from jem.batch import Views
from jem.config import PretrainConfig, VICRegConfig
from jem.data.index import open_index
from jem.data.plan import Plan, Position
from jem.data.read import local_batches
from jem.errors import InputError, RunError
from jem.methods import build_method
from jem.methods.base import Method, Progress, StepOutput
from jem.train import checkpoint
from jem.train.checkpoint import State
from jem.train.loop import Notice, fit
from tests.processes import run_on

CPU = torch.device("cpu")


def config_of(data: Path, **train: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "data": str(data),
            "limit": 112,
            "stream": {"canvas": 16, "window": 1},
            "augment": {"views": [{"count": 2, "size": 16, "scale": (0.5, 1.0)}]},
            "backbone": {"stem": "stride2"},
            "method": {"name": "vicreg", "expander": (32, 32)},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "schedule": {"warmup_epochs": 0.5},
            "train": {"epochs": 2, "batch_size": 32, "log_every": 1, "checkpoint_every": 1, **train},
            "evaluation": {"online": None},
        }
    )


@dataclass
class Told:
    """A reporter and a keeper that remember."""

    numbers: dict[str, dict[int, float]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    images: int = 0
    states: list[State] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)
    summaries: list[dict[str, float | str]] = field(default_factory=list)

    def metrics(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            assert step not in self.numbers.setdefault(name, {}), f"{name} is told twice for step {step}"
            self.numbers[name][step] = value

    def progress(self, images: int, info: dict[str, float]) -> None:
        self.images += images

    def say(self, message: str) -> None:
        self.said.append(message)

    def keep(self, state: State | None, step: int, summary: dict[str, float | str]) -> None:
        self.kept_at.append(step)
        self.summaries.append(summary)
        if state is not None:
            self.states.append(state)


def plan_of(config: PretrainConfig, world: int = 1) -> Plan:
    index = open_index(config.data, config.limit)
    stream, parts = config.stream, config.train.parts or world
    return Plan(index.rows, config.seed, config.train.batch_size, world, stream.window, stream.remainder, parts)


def source_of(config: PretrainConfig, plan: Plan, rank: int = 0) -> Callable[[Position], Iterator[Views]]:
    index = open_index(config.data, config.limit)

    def source(start: Position) -> Iterator[Views]:
        epochs = config.train.epochs
        batches = local_batches(index, plan, config.stream, rank, start, epochs)
        parts, positions = plan.parts_of(rank), plan.positions(start, epochs)
        generators = ([generator(config.seed, *position, part) for part in parts] for position in positions)
        for _, views in prefetched(batches, generators, Augment(config.augment), CPU):
            yield views

    return source


def run(
    config: PretrainConfig, state: State | None = None, method: Method | None = None, notice: Notice | None = None
) -> Told:
    told, plan = Told(), plan_of(config, distributed.world())
    torch.manual_seed(config.seed)
    method = method or build_method(config.method, config.backbone, None, len(open_index(config.data, config.limit)))
    source = source_of(config, plan, distributed.rank())
    fit(config, method, source, plan, told, told.keep, device=CPU, state=state, notice=notice)
    return told


def same(a: State, b: State) -> bool:
    assert a.model.keys() == b.model.keys()
    tensors = [(a.model[name], b.model[name]) for name in a.model]
    for number, slots in a.optimizer["state"].items():
        tensors += [(slots[name], b.optimizer["state"][number][name]) for name in slots]
    return a.step == b.step and all(torch.equal(x, y) for x, y in tensors)


def test_a_run_resumed_after_any_step_ends_with_the_same_weights_bit_for_bit(digits_dataset, tmp_path):
    whole = run(config_of(digits_dataset))
    assert [state.step for state in whole.states] == [1, 2, 3, 4, 5, 6]
    for interrupted in whole.states[1:5]:  # in mid-epoch, and between the epochs
        checkpoint.save(interrupted, tmp_path / str(interrupted.step))
        rest = run(config_of(digits_dataset), checkpoint.load(tmp_path / str(interrupted.step)))
        assert rest.kept_at == list(range(interrupted.step + 1, 7))
        assert same(rest.states[-1], whole.states[-1])
        for name in ("train/loss", "train/lr", "health/std"):
            after = {step: value for step, value in whole.numbers[name].items() if step > interrupted.step}
            assert rest.numbers[name] == after


MEMORIES = {
    "byol": {"projector": (16, 8), "predictor": (16, 8)},
    "moco": {"projector": (16, 8), "queue": 64, "norm_groups": 4},
    "pirl": {"projector": (8,), "patch_size": 16, "negatives": 32},
    "swav": {"projector": (16, 8), "prototypes": 8, "queue": 64, "queue_from_epoch": 1},
    "deepcluster": {"projector": (16, 8), "prototypes": (6, 4)},
    "obow": {"words": 32},
    "directpred": {"projector": (16, 8)},
    "dino": {"projector": (16, 8), "prototypes": 32},
}


@pytest.mark.parametrize("name", list(MEMORIES))
def test_what_a_method_remembers_outlives_an_interruption_in_mid_epoch_bit_for_bit(digits_dataset, tmp_path, name):
    """Queues in their order, banks by id, assignments of the epoch, teachers, centres, closed-form predictors."""

    def config() -> PretrainConfig:
        values = config_of(digits_dataset).model_dump() | {"method": {"name": name, **MEMORIES[name]}}
        return PretrainConfig.model_validate(values)

    whole = run(config())
    interrupted = whole.states[3]
    assert interrupted.step == 4, "one step of the second epoch is done, two are not"
    checkpoint.save(interrupted, tmp_path)
    rest = run(config(), checkpoint.load(tmp_path))
    assert rest.kept_at == [5, 6]
    assert same(rest.states[-1], whole.states[-1])


def test_another_seed_or_a_lost_step_ends_with_other_weights(digits_dataset):
    whole = run(config_of(digits_dataset))
    other = run(config_of(digits_dataset).model_copy(update={"seed": 1}))
    assert not same(whole.states[-1], other.states[-1])
    skipped = State(whole.states[1].model, whole.states[1].optimizer, 3, 1)
    assert not same(run(config_of(digits_dataset), skipped).states[-1], whole.states[-1])


def _two_workers(data: Path) -> tuple[list[bytes], list[int]]:
    whole = run(config_of(data))
    halfway = pickle.loads(pickle.dumps(whole.states[1])) if whole.states else None
    states = [None]
    if distributed.rank() == 0:
        states = [halfway]
    torch.distributed.broadcast_object_list(states)
    rest = run(config_of(data), states[0])
    ends = [told.states[-1].model for told in (whole, rest) if told.states]
    return [pickle.dumps({k: v.numpy() for k, v in end.items()}) for end in ends], whole.kept_at


def test_two_workers_resume_bit_for_bit_and_only_the_first_keeps_a_state(digits_dataset):
    (ends, kept), (none, also_kept) = run_on(2, _two_workers, digits_dataset)
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert none == []
    assert kept == also_kept == [1, 2, 3, 4, 5, 6], "all workers take part in every checkpoint"


def _in_two_parts(data: Path) -> PretrainConfig:
    values = config_of(data, parts=2, precision="fp32", accumulate=2, epochs=1).model_dump()
    return PretrainConfig.model_validate(values | {"optimizer": {"name": "sgd", "lr": 0.3}})


def _go_on(data: Path, kept: Path) -> tuple[dict[int, float], dict[str, np.ndarray]]:
    told = run(_in_two_parts(data), checkpoint.load(kept))
    end = {name: value.numpy() for name, value in told.states[-1].model.items()} if told.states else {}
    return told.numbers.get("train/loss", {}), end


def test_a_run_that_goes_on_with_two_workers_is_the_run_of_one(digits_dataset, tmp_path):
    """The same images, views and parts of accumulation: only the order of sums differs."""
    whole = run(_in_two_parts(digits_dataset))
    checkpoint.save(whole.states[0], tmp_path)
    (losses, end), _ = run_on(2, _go_on, digits_dataset, tmp_path)
    assert list(losses) == [2, 3]
    assert losses == pytest.approx({step: whole.numbers["train/loss"][step] for step in losses}, rel=1e-3)
    for name, value in whole.states[-1].model.items():
        np.testing.assert_allclose(end[name], value.numpy(), rtol=1e-2, atol=1e-3, err_msg=name)


class Announced:
    """A notice that one rank gives once, from a step on."""

    def __init__(self, rank: int, asked: int) -> None:
        self._asked, self._given = asked, rank == distributed.rank()
        self.kept: list[tuple[int, bool]] = []

    def given(self) -> bool:
        self._asked -= 1
        return self._given and self._asked < 0 and not self.kept

    def keep(self, state: State | None, step: int, summary: dict[str, float | str]) -> None:
        self.kept.append((step, state is not None))


def _announced(data: Path) -> tuple[list[tuple[int, bool]], list[int]]:
    notice = Announced(rank=1, asked=1)
    told = run(config_of(data, checkpoint_every=3), notice=notice)
    return notice.kept, told.kept_at


def test_what_one_worker_is_told_makes_all_keep_a_checkpoint_at_once(digits_dataset):
    (first, regular), (second, also_regular) = run_on(2, _announced, digits_dataset)
    assert first == [(2, True)]
    assert second == [(2, False)]
    assert regular == also_regular == [3, 6]


def test_every_term_and_rate_is_told_at_its_interval(digits_dataset):
    told = run(config_of(digits_dataset, log_every=2, health_every=5, checkpoint_every=None))
    terms = {"loss", "invariance", "variance", "covariance", "lr", "weight_decay", "images_per_second", "wait_share"}
    assert {name.removeprefix("train/") for name in told.numbers if name.startswith("train/")} == terms
    for term in terms:
        assert list(told.numbers[f"train/{term}"]) == [2, 4, 6]
    assert list(told.numbers["health/rankme"]) == [3, 5, 6], "every 5 steps, and at each epoch's end"
    assert told.images == 6 * 32
    assert told.kept_at == [3, 6], "at each epoch's end"
    assert [line.split(":")[0] for line in told.said] == ["epoch 1/2", "epoch 2/2"]
    assert told.summaries[-1]["collapse"] == 0


def test_the_logged_loss_is_the_weighted_sum_of_its_terms(digits_dataset):
    told = run(config_of(digits_dataset))
    for step, loss in told.numbers["train/loss"].items():
        s, v, c = (told.numbers[f"train/{term}"][step] for term in ("invariance", "variance", "covariance"))
        assert loss == pytest.approx(25 * s + 25 * v + c, rel=1e-5)


def test_learning_rate_warms_up_and_falls(digits_dataset):
    rates = list(run(config_of(digits_dataset, epochs=4)).numbers["train/lr"].values())
    peak = 0.01 * 32 / 256
    assert rates[0] == 0
    assert max(rates) == rates[2] == pytest.approx(peak)
    assert rates[-1] == pytest.approx(0.001 * peak)
    assert rates[2:] == sorted(rates[2:], reverse=True)


class Broken(Method):
    """A method whose second term is not a number from its third step on."""

    def __init__(self) -> None:
        super().__init__(VICRegConfig())
        self.layer = torch.nn.Linear(3, 4)
        self.steps = 0

    @property
    def backbone(self):
        raise AssertionError("not asked for")

    def forward(self, views: Views) -> StepOutput:
        self.steps += 1
        z = self.layer(views.views[0].mean((2, 3)))
        bad = z.new_tensor(float("nan") if self.steps >= 3 else 0.0)
        return StepOutput(z.square().mean() + bad, z.detach(), z.detach(), {"good": z.mean().detach(), "bad": bad})


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_term_and_keeps_no_such_state(digits_dataset):
    told = Told()
    config = config_of(digits_dataset, sync_bn=False)
    plan = plan_of(config)
    with pytest.raises(RunError, match=r"not finite since step 3: loss, bad\. Lower optimizer\.lr") as caught:
        fit(config, Broken(), source_of(config, plan), plan, told, told.keep, device=CPU)
    assert "\n" not in str(caught.value)
    assert told.kept_at == [1, 2]


class Constant(Broken):
    """A method with one output for every image."""

    def forward(self, views: Views) -> StepOutput:
        z = self.layer(torch.ones(len(views), 3))
        return StepOutput(z.square().mean(), z.detach(), z.detach(), {})


def test_a_collapse_is_said_once_in_words_and_is_in_the_summary(digits_dataset):
    told = Told()
    config = config_of(digits_dataset, sync_bn=False)
    plan = plan_of(config)
    fit(config, Constant(), source_of(config, plan), plan, told, told.keep, device=CPU)
    assert [line for line in told.said if "collapsed" in line] == [line for line in told.said if "step 3" in line]
    assert told.summaries[-1]["collapse"] == 1
    assert "collapsed" in str(told.summaries[-1]["verdict"])


class Mean(Broken):
    """A method whose gradient is linear in the images, so that parts of a batch average to the whole."""

    def forward(self, views: Views) -> StepOutput:
        z = self.layer(views.views[0].mean((2, 3)))
        return StepOutput(z.mean(), z.detach(), z.detach(), {})


def test_accumulated_parts_make_the_same_step_as_the_whole_batch(digits_dataset):
    ends = []
    for parts in (1, 4):
        torch.manual_seed(0)
        ends.append(run(config_of(digits_dataset, accumulate=parts, precision="fp32"), method=Mean()).states[-1])
    for name in ends[0].model:
        torch.testing.assert_close(ends[0].model[name], ends[1].model[name])


class Diary(Mean):
    """A method that notes what is called, with which progress, and what had happened to its weights by then."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[str, Progress | None]] = []
        self.weights: list[torch.Tensor] = []
        self.gradients: list[bool] = []

    def _note(self, name: str, progress: Progress | None = None) -> None:
        self.notes.append((name, progress))
        self.weights.append(self.layer.weight.detach().clone())
        self.gradients.append(self.layer.weight.grad is not None)

    def before_step(self, progress: Progress) -> None:
        super().before_step(progress)
        self._note("before_step", progress)

    def forward(self, views: Views) -> StepOutput:
        self._note("forward")
        return super().forward(views)

    def after_backward(self, progress: Progress) -> None:
        self._note("after_backward", progress)
        if progress.epoch == 0:
            self.layer.weight.grad = None

    def after_step(self, progress: Progress) -> None:
        self._note("after_step", progress)


def test_the_hooks_are_called_in_order_with_where_the_training_is(digits_dataset):
    diary = Diary()
    config = config_of(digits_dataset, accumulate=2, precision="fp32").model_copy(update={"seed": 3})
    run(config, method=diary)
    names = ["before_step", "forward", "forward", "after_backward", "after_step"]
    assert [name for name, _ in diary.notes] == names * 6
    for step in range(6):
        epoch, within = divmod(step, 3)
        before, *_, backward, after = (progress for _, progress in diary.notes[5 * step : 5 * step + 5])
        assert before == backward == Progress(step=step, total=6, epoch=epoch, first=within == 0, seed=3)
        assert after == Progress(step=step + 1, total=6, epoch=epoch, first=within == 0, seed=3)
        assert (before.share, after.share) == pytest.approx((step / 6, (step + 1) / 6))
        # the second forward pass finds the first one's gradient; the optimizer has moved nothing but before after_step
        assert diary.gradients[5 * step : 5 * step + 5] == [False, False, True, True, False]
        weights = diary.weights[5 * step : 5 * step + 5]
        assert all(torch.equal(weights[0], each) for each in weights[1:4])
        moved = not torch.equal(weights[0], weights[4])
        # the first step's rate is 0, and without its gradient a parameter stays
        assert moved == (epoch == 1)


def test_a_method_draws_the_same_in_the_same_step_whatever_went_before():
    first, second, other = (Progress(step=step, total=9, epoch=step, seed=1).generator() for step in (4, 4, 5))
    drawn = torch.rand(8, generator=first)
    assert torch.equal(drawn, torch.rand(8, generator=second))
    assert not torch.equal(drawn, torch.rand(8, generator=other))
    assert not torch.equal(drawn, torch.rand(8, generator=Progress(step=4, total=9, epoch=4, seed=2).generator()))
    diary = Diary()
    diary.before_step(Progress(step=4, total=9, epoch=4, seed=1))
    assert torch.equal(drawn, torch.rand(8, generator=diary.generator))


def test_the_gradient_norm_is_limited(digits_dataset):
    values = config_of(digits_dataset, clip_norm=1e-3, precision="fp32").model_dump()
    values["optimizer"] = {"name": "sgd", "lr": 8.0, "momentum": 0.0, "weight_decay": 0.0}
    config = PretrainConfig.model_validate(values)
    torch.manual_seed(0)
    method = Mean()
    before = [parameter.detach().clone() for parameter in method.parameters()]
    told = run(config, method=method)
    moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(method.parameters(), before, strict=True)]).norm()
    furthest = sum(told.numbers["train/lr"].values()) * 1e-3
    assert 0.5 * furthest < float(moved) <= furthest * 1.001


def test_a_checkpoint_that_would_have_to_be_unpickled_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"model": Evil()}, tmp_path / checkpoint.FILE)
    with pytest.raises(InputError, match="is not a checkpoint"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_or_truncated_checkpoint_is_said_to_be(tmp_path, digits_dataset):
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.load(tmp_path)
    checkpoint.save(run(config_of(digits_dataset, epochs=1)).states[-1], tmp_path)
    file = tmp_path / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a checkpoint"):
        checkpoint.load(tmp_path)
