"""The training loop on the real stream beside the same step on tensors that are in memory already.

    python benchmarks/end_to_end.py [--steps 40] [--rounds 3]

CPU: VICReg's CPU recipe (ResNet-18, 32 px, batch 256) on CIFAR-10. Where there is a GPU, also ResNet-18 with the CIFAR
stem at 32 px, ResNet-50 and ViT-S/16 at 224 px, on photographs.

memory      the same views in each step
augmented   the same decoded batch in each step, augmented anew
stream      decoded by the stream, augmented, trained on: the whole loop

The first 8 steps of each run, with the stream's start, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

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

GPU_RUNS = {
    "ResNet-18, CIFAR stem, 32 px": ("vicreg-cifar10", "--train.batch_size", "512"),
    "ResNet-50, 224 px": ("byol-imagenet", "--train.batch_size", "256", "--cluster.workers", "1"),
    "ViT-S/16, 224 px": ("mocov3-imagenet", "--train.batch_size", "256", "--cluster.workers", "1"),
}


WARM_UP = 8
"""Steps."""


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

    def stream(self, start: Position) -> Iterator[Views]:
        pin = self.device.type == "cuda"
        cpus = torch.get_num_threads()
        placement = place(self.config.cluster, self.config.stream, Cluster((Node("", cpus, int(pin), 0.0),)))
        batches = ray_batches(
            self.index,
            self.plan,
            self.config.stream,
            0,
            start,
            1000,
            decode_tasks=placement.decode_tasks,
            pin_memory=pin,
        )
        drawn = (generator(0, *position, 0) for position in self.plan.positions(start, 1000))
        for _, views in prefetched(self.timed(batches), drawn, self.augment, self.device, self.dtype):
            yield views

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same, and notes for how long it waited after the warm-up."""
        waited, began = 0.0, 0.0
        try:
            for step in range(self.steps):
                asked = time.perf_counter()
                batch = next(batches)
                if step == WARM_UP:
                    began = time.perf_counter()
                elif step > WARM_UP:
                    waited += time.perf_counter() - asked
                yield batch
        finally:
            self.waited.append(waited / (time.perf_counter() - began))
            batches.close()  # type: ignore[attr-defined]

    def run(self, source: str) -> tuple[int, float]:
        """Train; returns the number of images after the warm-up, and in how many seconds."""
        config, device = self.config, self.device
        torch.manual_seed(0)
        method = build_method(config.method, config.backbone, 1000, len(self.index))
        began = 0.0

        def views(start: Position) -> Iterator[Views]:
            nonlocal began
            for step, made in enumerate(getattr(self, source)(start)):
                if step == WARM_UP:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    began = time.perf_counter()
                yield made

        fit(config, method, views, _Short(self.plan, self.steps), Quiet(), _forget, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (self.steps - WARM_UP) * config.train.batch_size, time.perf_counter() - began


class _Short(Plan):
    """A plan that ends after so many steps."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.__dict__.update(plan.__dict__)
        self.__dict__["_most"] = steps

    def total_steps(self, epochs: int) -> int:
        return min(super().total_steps(epochs), self.__dict__["_most"])


def _forget(_state: State | None, _step: int, _summary: Summary) -> None:
    pass


def compare(title: str, recipe: tuple[str, ...], data: str, arguments: argparse.Namespace, device: str) -> None:
    """Print the table of one network."""
    config = load_config(
        PretrainConfig, ["--recipe", recipe[0], "--data", data, "--evaluation.online", "null", *recipe[1:]]
    )
    loop = Loop(config, open_index(data), arguments.steps, torch.device(device))
    print(f"{title}: {arguments.steps} steps of {config.train.batch_size}", flush=True)
    ways = [Way(name, lambda name=name: loop.run(name)) for name in ("stream", "memory", "augmented")]  # type: ignore[misc]
    in_turns(ways, arguments.rounds)
    print(table(title, ways))
    stream, memory, augmented = ways
    print(f"the loop on the stream reaches {stream.median / memory.median:.2f} of the rate from memory, and", end=" ")
    print(f"{stream.median / augmented.median:.2f} of that with augmentation;", end=" ")
    print(f"it waits for data for {statistics.median(loop.waited):.1%} of the time\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The loop on the stream beside the step from memory")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    use_cpu(torch.get_num_threads())  # as a train worker does
    cifar = str((SHARED / "cifar10/train").resolve())
    with own_ray(), memory_folder() as folder:
        small = ("vicreg-cifar10-cpu", "--cluster.workers", "1")
        compare("ResNet-18, 32 px, CPU", small, cifar, arguments, "cpu")
        if not torch.cuda.is_available():
            print("no GPU here: nothing is measured on one")
            return
        photographs(Path(folder), PHOTOS)
        for title, recipe in GPU_RUNS.items():
            compare(title, recipe, cifar if "32 px" in title else folder, arguments, "cuda")


if __name__ == "__main__":
    main()
