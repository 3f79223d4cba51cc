"""What the watch says of an embedding: by what the loss holds it to, and by the representation below it."""

from __future__ import annotations

import torch
from torch import Tensor

from jem.config import TrainConfig
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
