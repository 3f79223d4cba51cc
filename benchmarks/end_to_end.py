"""The training loop on the real stream beside the same step on tensors that are in memory already.

    python benchmarks/end_to_end.py [cpu resnet18 resnet50 vit] [--steps 40] [--rounds 3] [--compile]

cpu       VICReg's CPU recipe, ResNet-18 at 32 px, batch 256, on CIFAR-10
resnet18  where there is a GPU: VICReg, ResNet-18 with the CIFAR stem at 32 px, batch 512, on CIFAR-10
resnet50  where there is a GPU: BYOL, ResNet-50 at 224 px, batch 256, on photographs
vit       where there is a GPU: MoCo v3, ViT-S/16 at 224 px, batch 256, on photographs

memory      the same views in each step
augmented   the same decoded batch in each step, augmented anew
stream      decoded by the stream, augmented, trained on: the whole loop

The first 8 steps of each run, with the stream's start, and the last one, with the checkpoint, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import TypeVar

import torch
from alternate import Way, in_turns, table
from stream import PHOTOS, SHARED, memory_folder, own_ray, photographs

from jem.augment.views import Augment, generator, prefetched
from jem.batch import Batch, Views
from jem.config import PretrainConfig
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.stream import ray_batches
from jem.device import use_cpu
from jem.methods import build_method
from jem.train.checkpoint import State
from jem.train.loop import fit
from jem.train.watch import Summary
from pipelines.cluster import Cluster, Node, place
from pipelines.settings import load_config

VIT = '{"name": "vit_small", "patch": 16}'
GPU_RUNS = {
    "resnet18": ("VICReg, ResNet-18 with CIFAR stem, 32 px", ("vicreg-cifar10", "--train.batch_size", "512")),
    "resnet50": ("BYOL, ResNet-50, 224 px", ("byol-imagenet", "--train.batch_size", "256")),
    "vit": ("MoCo v3, ViT-S/16, 224 px", ("mocov3-imagenet", "--train.batch_size", "256", "--backbone", VIT)),
}
SHORT = 10
"""So many times the steps where one takes milliseconds."""


CPUS = torch.get_num_threads()
WARM_UP = 8
"""Steps."""
DRAINED = 3.0
"""Seconds before a run in which what the stream holds ready is taken."""
EPOCHS = 1000
Item = TypeVar("Item")


class Quiet:
    """A reporter that says nothing."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        pass

    def progress(self, images: int, info: dict[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class Loop:
    """A training of so many steps, from one of the three sources."""

    def __init__(self, config: PretrainConfig, index: Index, steps: int, device: torch.device) -> None:
        self.config, self.index, self.steps, self.device = config, index, steps, device
        self.waited: list[float] = []
        """Share of its time for which each run from the stream waited for data."""
        size = config.train.batch_size
        self.plan = Plan(index.rows, config.seed, size, 1, config.stream.window, "carry")
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.augment = Augment(config.augment)
        self.batches: Iterator[Batch] | None = None
        """The stream, which goes on from run to run: starting its processes is not what is measured."""
        self.positions = self.plan.positions(Position(0, 0), EPOCHS)
        self.alone: list[float] = []
        """Images/s of the stream before each run, with nobody training."""
        canvas = config.stream.canvas
        image = torch.randint(0, 256, (size, canvas, canvas, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self.batch = Batch(
            image.to(device),
            torch.full((size, 2), canvas),
            torch.arange(size).to(device),
            torch.zeros(size, dtype=torch.int64).to(device),
        )

    def memory(self, start: Position) -> Iterator[Views]:
        return repeat(self.augment(self.batch, generator(0, *start, 0), self.dtype), self.steps)

    def augmented(self, _start: Position) -> Iterator[Views]:
        drawn = (generator(0, 0, step, 0) for step in range(self.steps))
        for _, views in prefetched(repeat(self.batch, self.steps), drawn, self.augment, self.device, self.dtype):
            yield views

    def stream(self, _start: Position) -> Iterator[Views]:
        batches = islice(self.drained(), self.steps)
        drawn = (generator(0, *position, 0) for position in self.positions)
        # on a CPU the step makes the views itself, on a GPU it waits for those that are made beside it
        cuda = self.device.type == "cuda"
        pairs = prefetched(batches if cuda else self.timed(batches), drawn, self.augment, self.device, self.dtype)
        for _, views in self.timed(pairs) if cuda else pairs:
            yield views

    def drained(self) -> Iterator[Batch]:
        """The stream, with nothing left of what it decoded while nobody trained."""
        if self.batches is None:
            pin = self.device.type == "cuda"
            placement = place(self.config.cluster, self.config.stream, Cluster((Node("", CPUS, int(pin), 0.0),)))
            tasks, start = placement.decode_tasks, Position(0, 0)
            stream = (self.index, self.plan, self.config.stream, 0, start, EPOCHS)
            self.batches = ray_batches(*stream, decode_tasks=tasks, pin_memory=pin)
            for _ in range(4 * tasks):  # each of its processes has started
                next(self.batches)
        began, taken = time.perf_counter(), 0
        while (waited := time.perf_counter() - began) < DRAINED:
            taken += len(next(self.batches))
        self.alone.append(taken / waited)
        return self.batches

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same, one for each step, and notes for how long it waited after the warm-up."""
        waited, began = 0.0, 0.0
        for step in range(self.steps):
            asked = time.perf_counter()
            item = next(items)
            if step == WARM_UP:
                began = time.perf_counter()
            elif step > WARM_UP:
                waited += time.perf_counter() - asked
            if step == self.steps - 1:
                self.waited.append(waited / (time.perf_counter() - began))
            yield item

    def close(self) -> None:
        """End the stream."""
        if self.batches is not None:
            self.batches.close()  # type: ignore[attr-defined]

    def run(self, source: str) -> tuple[int, float]:
        """Train; returns the number of images between the warm-up and the last step, and in how many seconds."""
        config, device = self.config, self.device
        torch.manual_seed(0)
        method = build_method(config.method, config.backbone, 1000, len(self.index))
        moments: list[float] = []

        def views(start: Position) -> Iterator[Views]:
            for step, made in enumerate(getattr(self, source)(start)):
                if step in (WARM_UP, self.steps - 1):  # the last step's checkpoint, and the stream's end, do not count
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    moments.append(time.perf_counter())
                yield made

        fit(config, method, views, _Short(self.plan, self.steps), Quiet(), _forget, device=device)
        return (self.steps - 1 - WARM_UP) * config.train.batch_size, moments[1] - moments[0]


class _Short(Plan):
    """A plan that ends after so many steps."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.__dict__.update(plan.__dict__)
        self.__dict__["_most"] = steps

    def total_steps(self, epochs: int) -> int:
        return min(super().total_steps(epochs), self.__dict__["_most"])


def _forget(_state: State | None, _step: int, _summary: Summary) -> None:
    pass


def compare(title: str, recipe: Sequence[str], data: str, steps: int, rounds: int, device: str) -> None:
    """Print the table of one network."""
    alone = ("--cluster.workers", "1", "--evaluation.online", "null")
    config = load_config(PretrainConfig, ["--recipe", recipe[0], "--data", data, *alone, *recipe[1:]])
    loop = Loop(config, open_index(data), steps, torch.device(device))
    print(f"{title}: {steps} steps of {config.train.batch_size}", flush=True)
    ways = [Way(name, lambda name=name: loop.run(name)) for name in ("stream", "memory", "augmented")]  # type: ignore[misc]
    in_turns(ways, rounds)
    print(table(title, ways))
    stream, memory, augmented = ways
    print(f"the loop on the stream reaches {stream.median / memory.median:.2f} of the rate from memory, and", end=" ")
    print(f"{stream.median / augmented.median:.2f} of that with augmentation, which makes a step", end=" ")
    print(f"{memory.median / augmented.median - 1:.1%} longer;", end=" ")
    print(f"it waits for data for {statistics.median(loop.waited):.1%} of the time;", end=" ")
    print(f"the stream alone gives {statistics.median(loop.alone):.0f} images/s\n")
    loop.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The loop on the stream beside the step from memory")
    parser.add_argument("what", nargs="*", default=["cpu", *GPU_RUNS])
    parser.add_argument("--steps", type=int, default=40, help="ten times as many of resnet18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="with train.compile")
    arguments = parser.parse_args()
    use_cpu(CPUS)  # as a train worker does
    cifar = str((SHARED / "cifar10/train").resolve())
    more = ("--train.compile", "true") if arguments.compile else ()
    with own_ray(), memory_folder() as folder:
        if "cpu" in arguments.what:
            small = ("vicreg-cifar10-cpu", *more)
            compare("VICReg, ResNet-18, 32 px, CPU", small, cifar, arguments.steps, arguments.rounds, "cpu")
        if not torch.cuda.is_available():
            print("no GPU here: nothing is measured on one")
            return
        print(torch.cuda.get_device_name())
        torch.set_num_threads(1)  # as Ray does
        photographs(Path(folder), PHOTOS)
        for name in [each for each in GPU_RUNS if each in arguments.what]:
            title, recipe = GPU_RUNS[name]
            data, steps = (cifar, SHORT * arguments.steps) if name == "resnet18" else (folder, arguments.steps)
            compare(title, (*recipe, *more), data, steps, arguments.rounds, "cuda")


if __name__ == "__main__":
    main()
