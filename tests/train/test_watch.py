"""What the watch says of an embedding: by what the loss holds it to, and by the representation below it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jem.config import TrainConfig
from jem.errors import RunError
from jem.methods.base import StepOutput
from jem.train.watch import Watch


class Told:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.numbers: dict[str, float] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.numbers |= values

    def progress(self, images: int, info: dict[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        self.said.append(message)


def examined(
    embedding: Tensor, representation: Tensor, *, scaled: bool, assignment: Tensor | None = None
) -> tuple[Watch, Told]:
    told = Told()
    watch = Watch(TrainConfig(), told, 0, scaled=scaled)
    loss = torch.tensor(1.0)
    output = StepOutput(loss, embedding, representation, assignment=assignment)
    watch.step(output, 64, 1, {"lr": 0.1}, last=True)
    return watch, told


def healthy(seed: int = 0) -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))


def test_a_small_embedding_is_a_collapse_only_where_the_loss_holds_it_to_a_scale() -> None:
    small = 0.01 * healthy()
    assert examined(small, healthy(1), scaled=True)[0].summary()["collapse"] == 1
    assert examined(small, healthy(1), scaled=False)[0].summary()["collapse"] == 0


def test_a_collapsed_representation_is_named_below_a_healthy_embedding() -> None:
    one = torch.ones(64, 8) + 0.001 * healthy(1)
    watch, told = examined(healthy(), one, scaled=False)
    assert watch.summary()["collapse"] == 1
    assert told.said == [f"step 1: {watch.summary()['verdict']}"]
    assert told.said[0].startswith("step 1: the representation is collapsed (complete): the spread is 0.001")
    assert told.numbers["health/spread"] > 0.9
    assert told.numbers["health/representation_spread"] < 0.01


def test_repeated_dimensions_are_named_as_the_second_type() -> None:
    repeated = healthy()[:, :1].expand(64, 8) + 0.01 * healthy(1)
    watch, _ = examined(repeated, healthy(1), scaled=False)
    assert watch.summary()["collapse"] == 2
    assert "informational" in str(watch.summary()["verdict"])


def test_one_assignment_for_all_images_is_a_collapse_and_correlated_ones_are_none() -> None:
    scores = torch.randn(64, 1, generator=torch.Generator().manual_seed(2)) * torch.tensor([3.0, 3.0, -3.0, -3.0])
    for assignment, kind in ((scores.softmax(dim=1), 0), ((1e-3 * scores).softmax(dim=1), 1)):
        watch, _ = examined(healthy(), healthy(1), scaled=False, assignment=assignment)
        assert watch.summary()["collapse"] == kind
    assert str(watch.summary()["verdict"]).startswith("the assignment to clusters is collapsed (complete)")


class Diary(Told):
    """Notes the step of each piece of news."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []
        self.images: list[int] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        super().metrics(values, step)
        self.told.append((next(iter(values)).partition("/")[0], step))

    def progress(self, images: int, info: dict[str, float]) -> None:
        self.images.append(images)


def test_late_news_come_one_step_later_and_are_the_same() -> None:
    """A late watch reads a step's numbers once the next step is on its way, or the epoch ends."""
    seen: dict[bool, list[list[tuple[str, int]]]] = {}
    ends = {}
    for late in (False, True):
        diary = Diary()
        watch = Watch(TrainConfig(log_every=2, health_every=3), diary, 0, scaled=False, late=late)
        seen[late] = []
        for step in range(1, 8):
            loss = torch.tensor(float(step))
            before = len(diary.told)
            watch.step(StepOutput(loss, healthy(step), healthy(-step)), 64, step, {"lr": 0.1}, last=step == 7)
            seen[late].append(diary.told[before:])
        ends[late] = (diary.told, diary.images, diary.numbers["train/loss"], watch.health)
    at_once = [[], [("train", 2)], [("health", 3)], [("train", 4)], [], [("train", 6), ("health", 6)], [("health", 7)]]
    assert seen[False] == at_once
    assert seen[True] == [[], *at_once[:5], [("train", 6), ("health", 6), ("health", 7)]]
    assert ends[True] == ends[False]
    assert ends[True][1:3] == ([128, 128, 128], 6.0)


def test_a_late_watch_stops_a_step_later_and_names_the_first_bad_one_and_no_checkpoint_passes() -> None:
    def steps(stop: int) -> Watch:
        watch = Watch(TrainConfig(log_every=2), Told(), 0, scaled=False, late=True)
        for step in range(1, stop + 1):
            loss = torch.tensor(1.0 if step < 3 else float("nan"))
            watch.step(StepOutput(loss, healthy(), healthy(1)), 64, step, {"lr": 0.1}, last=False)
        return watch

    for stop in (3, 4):  # nothing was due after step 3; what was due after step 4 is not read yet
        with pytest.raises(RunError, match="not finite since step 3: loss"):
            steps(stop).check(0.1)
    with pytest.raises(RunError, match="not finite since step 3: loss"):
        steps(5)
    steps(2).check(0.1)
