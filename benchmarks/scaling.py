"""What more machines would need: the stream's rate by decode tasks and nodes, and each method's traffic, measured here.

    python benchmarks/scaling.py [stream traffic plan] [--images-per-gpu 1000]

stream   photographs to a canvas of 256, with 1, 2 and 4 decode tasks, and on 1, 2 and 4 nodes (simulated on this
         machine by `ray.cluster_utils.Cluster`: they share its cores)
traffic  bytes that one worker sends or receives in a step, counted in one step of 2 gloo workers with each ImageNet
         recipe's networks
plan     what 8, 64 and 512 GPUs need, from the costs measured here and the images/s of one GPU, which is an assumption
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from stream import BATCH, PHOTOS, Ours, memory_folder, photographs

from jem import distributed
from jem.batch import Views
from jem.config import PretrainConfig, StreamConfig
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import local_batches
from jem.methods import build_method
from jem.methods.base import Progress
from pipelines.cluster import KEEP_IDLE
from pipelines.settings import load_config, recipe_names

CANVAS = 256
GPUS_PER_NODE = 8
NODE_STORE = 2 * 2**30
"""Bytes of a simulated node's object store."""
IMAGES = 8
MORE_IMAGES = {"wmse": 256}
"""Images on a worker in the smaller of two steps, where `IMAGES` are too few for the method."""


# --- the stream -----------------------------------------------------------------------------------------------------


def stream_rates(index: Index) -> None:
    """Print images/s by number of decode tasks and of nodes."""
    print("| nodes | decode tasks | images/s | first batch, s |\n| --- | --- | --- | --- |")
    for nodes, tasks in ((1, 1), (1, 2), (1, 4), (2, 2), (4, 4)):
        room = {"num_cpus": max(1, 2 // nodes), "object_store_memory": NODE_STORE}
        cluster = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
        for _ in range(nodes - 1):
            cluster.add_node(**room)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        ours = Ours(index, CANVAS, 1, tasks=tasks)
        ours()
        began = time.perf_counter()
        images = ours()
        rate = images / (time.perf_counter() - began)
        print(f"| {nodes} | {tasks} | {rate:.0f} | {ours.first[-1]:.2f} |", flush=True)
        ray.shutdown()
        cluster.shutdown()
    print()


def decode_seconds(index: Index) -> float:
    """Processor seconds to read, decode and squash one image, on one core."""
    torch.set_num_threads(1)
    plan = Plan(index.rows, 0, BATCH, 1)
    batches = local_batches(index, plan, StreamConfig(canvas=CANVAS), 0, Position(0, 0), 1)
    next(batches)
    began, images = time.process_time(), 0
    for batch in batches:
        images += len(batch)
    return (time.process_time() - began) / images


# --- what workers send each other -----------------------------------------------------------------------------------


def traffic() -> dict[str, tuple[float, float, float]]:
    """For each recipe: bytes of parameters with a gradient, bytes received per image of the others', other bytes."""
    print("| recipe | gradient, MB | from each other image, kB | others, MB |\n| --- | --- | --- | --- |")
    found = {}
    for recipe in recipe_names():
        if not recipe.endswith("-imagenet"):
            continue
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = [context.Process(target=_steps, args=(rank, store.port, recipe, queue)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(900)
        if any(worker.exitcode != 0 for worker in workers):
            raise SystemExit(f"{recipe}: a worker failed")
        gradient, images, few, many = queue.get()
        each = (many - few) / images
        found[recipe] = gradient, each, few - images * each
        cells = f"{gradient / 1e6:.0f} | {each / 1e3:.1f} | {(few - images * each) / 1e6:.1f}"
        print(f"| {recipe.removesuffix('-imagenet')} | {cells} |", flush=True)
    print()
    return found


def _steps(rank: int, port: int, recipe: str, queue: Any) -> None:
    """One worker's passes of two steps, one of twice the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.TCPStore("127.0.0.1", port, is_master=False))
    config = load_config(PretrainConfig, ["--recipe", recipe, "--data", "x"])
    torch.manual_seed(0)
    method = build_method(config.method, config.backbone, 1000, 4096)
    distributed.convert_sync_batchnorm(method)
    method.train()
    counted = 0

    def count(function: Any, received: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += received(*args)
            return function(*args, **kwargs)

        return counting

    def size(x: torch.Tensor) -> int:
        return x.numel() * x.element_size()

    dist.all_gather_into_tensor = count(dist.all_gather_into_tensor, lambda out, x: size(out) - size(x))
    dist.all_reduce = count(dist.all_reduce, size)
    images = MORE_IMAGES.get(config.method.name, IMAGES)
    totals = []
    for number in (images, 2 * images):
        counted = 0
        method(_small_views(config, number, rank)).loss.backward()
        method.after_backward(Progress(0, 100, 0, True, 0))
        totals.append(counted)
    if rank == 0:
        gradient = sum(size(parameter) for parameter in method.parameters() if parameter.requires_grad)
        queue.put((gradient, images, *totals))
    dist.barrier()
    dist.destroy_process_group()


def _small_views(config: PretrainConfig, images: int, rank: int) -> Views:
    """Noise in the recipe's number of views, small: only what is derived from them is sent, but for MoCo.

    Its shuffled batch norm sends the images themselves.
    """
    views: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for view in config.augment.views:
        for _ in range(view.count):
            small = 64 if view.size > 128 and config.method.name != "wmse" else 32
            side = view.size if config.method.name == "moco" else small
            views.append(torch.randn(images, 3, side, side))
            patches = (side // view.mask.patch) ** 2 if view.mask else 0
            masks.append(torch.arange(patches).expand(images, -1) < patches // 2 if view.mask else None)
    ids = torch.arange(images) + images * rank
    return Views(views, ids, ids % 10, masks if any(mask is not None for mask in masks) else None)


# --- the plan -------------------------------------------------------------------------------------------------------


def plan(index: Index, sent: dict[str, tuple[float, float, float]], rate: float) -> None:
    """Print what 8, 64 and 512 GPUs need."""
    seconds = decode_seconds(index)
    encoded = sum(file.stat().st_size for file in map(Path, index.files)) / len(index)
    decoded = CANVAS**2 * 3
    print(f"measured: {seconds * 1e3:.2f} ms of a core, {encoded / 1e3:.0f} kB read, {decoded / 1e3:.0f} kB decoded,")
    print(f"for each image; assumed: {rate:g} images/s on a GPU, {GPUS_PER_NODE} GPUs on a node\n")
    print("| GPUs | images/s | cores for decoding | from storage, GB/s | into each GPU node, Gbit/s |")
    print("| --- | --- | --- | --- | --- |")
    for gpus in (8, 64, 512):
        images = gpus * rate
        node = GPUS_PER_NODE * rate * decoded * 8 / 1e9
        print(f"| {gpus} | {images:g} | {images * seconds:.0f} | {images * encoded / 1e9:.2f} | {node:.1f} |")
    print("\nreceived by each GPU in a step of its recipe's global batch, MB: embeddings and statistics + gradient\n")
    print("| recipe | batch | 8 GPUs | 64 GPUs | 512 GPUs |\n| --- | --- | --- | --- | --- |")
    for recipe, (gradient, each, other) in sent.items():
        batch = load_config(PretrainConfig, ["--recipe", recipe, "--data", "x"]).train.batch_size
        cells = [
            f"{(each * batch * (1 - 1 / gpus) + other) / 1e6:.0f} + {2 * gradient * (1 - 1 / gpus) / 1e6:.0f}"
            for gpus in (8, 64, 512)
        ]
        print(f"| {recipe.removesuffix('-imagenet')} | {batch} | {' | '.join(cells)} |")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What more machines would need")
    parser.add_argument("what", nargs="*", default=["stream", "traffic", "plan"])
    parser.add_argument("--images-per-gpu", type=float, default=1000.0)
    arguments = parser.parse_args()
    os.environ.setdefault(*KEEP_IDLE)
    sent = traffic() if {"traffic", "plan"} & set(arguments.what) else {}
    with memory_folder() as folder:
        photographs(Path(folder), PHOTOS)
        index = open_index(folder)
        if "stream" in arguments.what:
            stream_rates(index)
        if "plan" in arguments.what:
            plan(index, sent, arguments.images_per_gpu)


if __name__ == "__main__":
    main()
