"""The step on tensors in memory, beside lightly's modules in a plain loop: VICReg, two views, bf16, channels_last, SGD.

    pip install '.[bench]'
    python benchmarks/step.py [--steps 20] [--rounds 3] [--compile]

CPU: ResNet-18 at 32 px, batch 128. Where there is a GPU, ResNet-50 at 224 px, batch 256, too.
"""

from __future__ import annotations

import argparse
import time

import torch
from alternate import Way, in_turns, table
from end_to_end import WARM_UP, Loop
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from stream import SHARED
from torch import nn
from torchvision.models import resnet18, resnet50

from jem.config import PretrainConfig
from jem.data.index import open_index
from jem.data.plan import Position
from pipelines.settings import load_config

WIDTH = 2048


def lightlys(loop: Loop, network: nn.Module, dim: int) -> tuple[int, float]:
    """The loop of lightly's documentation with what makes torch fast added; returns what `Loop.run` does."""
    torch.manual_seed(0)
    network.fc = nn.Identity()
    head = VICRegProjectionHead(dim, WIDTH, WIDTH, num_layers=3)
    model = nn.Sequential(network, head).to(loop.device, memory_format=torch.channels_last).train()
    criterion = VICRegLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    began = 0.0
    for step, views in enumerate(loop.memory(Position(0, 0))):
        if step == WARM_UP:
            if loop.device.type == "cuda":
                torch.cuda.synchronize(loop.device)
            began = time.perf_counter()
        first, second = views.views
        with torch.autocast(loop.device.type, torch.bfloat16):
            z1, z2 = model(first), model(second)
        loss = criterion(z1.float(), z2.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
    return (loop.steps - WARM_UP) * loop.config.train.batch_size, time.perf_counter() - began


def compare(title: str, backbone: str, size: int, batch: int, arguments: argparse.Namespace, device: str) -> None:
    """Print the table of one network."""
    data = str((SHARED / "cifar10/train").resolve())
    made = (
        ("--recipe", "vicreg-cifar10", "--data", data, "--stream.canvas", str(size), "--train.batch_size", str(batch))
        + ("--augment.views", f'[{{"count": 2, "size": {size}}}]', "--backbone.name", backbone)
        + ("--backbone.stem", "imagenet", "--method.expander", f"[{WIDTH}, {WIDTH}, {WIDTH}]")
        + ("--optimizer", '{"name": "sgd"}', "--cluster.workers", "1", "--evaluation.online", "null")
        + (("--train.compile", "true") if arguments.compile else ())
    )
    loop = Loop(load_config(PretrainConfig, list(made)), open_index(data), arguments.steps, torch.device(device))
    networks = {"resnet18": (resnet18, 512), "resnet50": (resnet50, 2048)}
    network, dim = networks[backbone]
    ways = [
        Way("jem", lambda: loop.run("memory"), "forward and backward"),
        Way("lightly's modules in a plain loop", lambda: lightlys(loop, network(), dim), "forward and backward"),
    ]
    print(f"{title}: {arguments.steps} steps of {batch}", flush=True)
    in_turns(ways, arguments.rounds)
    print(table(title, ways) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The step beside lightly's modules")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="jem's step with train.compile")
    arguments = parser.parse_args()
    compare("ResNet-18, 32 px, CPU", "resnet18", 32, 128, arguments, "cpu")
    if torch.cuda.is_available():
        compare("ResNet-50, 224 px, GPU", "resnet50", 224, 256, arguments, "cuda")
    else:
        print("no GPU here: nothing is measured on one")


if __name__ == "__main__":
    main()
