"""The stream beside Ray's documented recipe and a PyTorch DataLoader: encoded images to uint8 batches.

    python benchmarks/stream.py [photos cifar10 memory] [--rounds 3] [--epochs 3] [--batch 128]

photos   400 photographs, repeated to 4,000 with ids of their own, decoded to a canvas of 256
cifar10  the training set, 32 px, from Parquet
memory   peak memory of one epoch of photographs, and of one of 20 times as many

Whole epochs, the start of each included. Every way gives shuffled (Ray's recipe: unshuffled) uint8 batches with labels,
and the consumer touches every page of each. Ray's recipe has a Ray of its own, as `ray.init()` starts it; jem's is the
one that `jem pretrain` starts. Beside them stands the least that jem's could take: as many processes as it has decode
tasks read and decode the same images, without Ray, and give them to nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from alternate import Way, in_turns, table
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tv

from jem.config import ClusterConfig, StreamConfig
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import read_window
from jem.data.shards import COMPRESSION
from jem.data.stream import ray_batches
from jem.memory import keep_freed
from pipelines.cluster import connect

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, on Linux
SHARED = Path(__file__).parent / "../../shared/data"
WORKERS = 2
TASKS = WORKERS  # as `jem pretrain` plans on 2 CPUs
BATCH, PHOTOS, MORE = 128, 4000, 20


def photographs(folder: Path, count: int) -> None:
    """A data set of `count` photographs in shards of 500, row groups of 32, compressed as by `jem ingest`."""
    files = sorted((SHARED / "photos").glob("*.JPEG"))
    if not files:
        raise SystemExit(f"no photographs in {SHARED / 'photos'}")
    for shard, low in enumerate(range(0, count, 500)):
        ids = np.arange(low, min(low + 500, count))
        images = [{"bytes": files[number % len(files)].read_bytes(), "path": ""} for number in ids]
        labels = ids % len(files)
        table = pa.table({"image": images, "label": labels, "id": ids})
        pq.write_table(table, folder / f"{shard:03d}.parquet", 32, compression=COMPRESSION, use_dictionary=False)


def touch(image: torch.Tensor) -> int:
    """Read one byte of each page; returns the number of images."""
    flat = image.permute(0, 2, 3, 1).reshape(-1) if image.shape[1] == 3 else image.reshape(-1)
    int(flat[::4096].sum())
    return len(image)


def decoded(data: bytes, canvas: int) -> torch.Tensor:
    """uint8 (3, S, S) by torchvision: what a user would write."""
    image = decode_image(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    return image if image.shape[1:] == (canvas, canvas) else tv.resize(image, [canvas, canvas], antialias=True)


# --- jem ------------------------------------------------------------------------------------------------------------


class Ours:
    """jem's stream, over all epochs; notes the waits for the first batch and, after a first call, for all others."""

    def __init__(self, index: Index, canvas: int, epochs: int, batch: int = BATCH, tasks: int = TASKS) -> None:
        self.index, self.epochs, self.tasks = index, epochs, tasks
        self.stream = StreamConfig(canvas=canvas)
        self.plan = Plan(index.rows, 0, batch, 1, self.stream.window, "carry")
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.waits: list[float] = []

    def __call__(self) -> int:
        start, images = Position(0, 0), 0
        asked = time.perf_counter()
        batches = ray_batches(self.index, self.plan, self.stream, 0, start, self.epochs, decode_tasks=self.tasks)
        for position, batch in zip(self.plan.positions(start, self.epochs), batches, strict=True):
            waited = time.perf_counter() - asked
            if position == start:
                self.first.append(waited)
            elif len(self.first) > 1:
                (self.waits if position.step else self.gaps).append(waited)
            images += touch(batch.image)
            asked = time.perf_counter()
        return images


def decode_share(folder: str, canvas: int, epochs: int, batch: int, share: int) -> int:
    """Read and decode a process's share of jem's windows, and give them to nobody; returns the number of images."""
    torch.set_num_threads(1)  # as in a task of Ray's
    keep_freed()
    ours = Ours(open_index(folder), canvas, epochs, batch)
    windows = list(ours.plan.windows(0, Position(0, 0), epochs))[share::TASKS]
    return sum(
        arrays["id"].size
        for window in windows
        for arrays in read_window(ours.index, ours.plan, window, canvas, ours.stream.pixel_limit)
    )


# --- Ray's recipe ---------------------------------------------------------------------------------------------------


def rays_recipe(folder: str, canvas: int, epochs: int, size: int) -> int:
    """`read_parquet`, `map_batches` with torchvision's decoder, `iter_torch_batches`."""

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        images = [decoded(row["bytes"], canvas).numpy() for row in batch["image"]]
        return {"image": np.stack(images), "label": batch["label"]}

    data = ray.data.read_parquet(folder).map_batches(decode)
    images = 0
    for _ in range(epochs):
        images += sum(touch(batch["image"]) for batch in data.iter_torch_batches(batch_size=size))
    return images


def start_ray() -> None:
    """As `ray.init()` starts it on one machine, but silent; this module's functions travel to its tasks whole."""
    ray.init("local", logging_level=logging.ERROR, log_to_driver=False)
    quieten()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@contextlib.contextmanager
def another_ray() -> Iterator[Pool]:
    """A process with a Ray of its own."""
    with multiprocessing.get_context("spawn").Pool(1, start_ray) as pool:
        yield pool
        pool.apply(ray.shutdown)


# --- a DataLoader ---------------------------------------------------------------------------------------------------


class Images(Dataset[tuple[torch.Tensor, int]]):
    """The encoded images in memory, decoded one by one."""

    def __init__(self, index: Index, canvas: int) -> None:
        table = pa.concat_tables(pq.read_table(file, columns=["image", "label"]) for file in index.files)
        self._canvas = canvas
        self._bytes = pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks])
        self._labels = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        return decoded(self._bytes[at].as_py(), self._canvas), int(self._labels[at])


def loader(index: Index, canvas: int, batch: int) -> DataLoader[tuple[torch.Tensor, int]]:
    """With workers that stay from epoch to epoch."""
    return DataLoader(
        Images(index, canvas),
        batch,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )


def epochs_of(batches: DataLoader[tuple[torch.Tensor, int]], epochs: int) -> int:
    """Iterate so many times."""
    return sum(touch(image) for _ in range(epochs) for image, _ in batches)


# --- comparisons ----------------------------------------------------------------------------------------------------


def compare(title: str, folder: str, canvas: int, arguments: argparse.Namespace) -> None:
    """Print the table of one data set."""
    index, epochs, batch = open_index(folder), arguments.epochs, arguments.batch
    ours, batches = Ours(index, canvas, epochs, batch), loader(index, canvas, batch)
    shares = [(folder, canvas, epochs, batch, share) for share in range(TASKS)]
    recipe = (folder, canvas, epochs, batch)
    with another_ray() as other, multiprocessing.get_context("spawn").Pool(TASKS) as bare:
        ways = [
            Way("jem", ours, "decoding" if canvas > 64 else "decoding, Ray's work for each block"),
            Way("Ray's recipe", lambda: other.apply(rays_recipe, recipe), "its epochs' starts, copies"),
            Way("DataLoader, 2 workers", lambda: epochs_of(batches, epochs), "decoding, a copy of each image"),
            Way("reading and decoding alone, 2 processes", lambda: sum(bare.starmap(decode_share, shares)), "decoding"),
        ]
        print(f"{title}: {len(index)} images, {epochs} epochs", flush=True)
        in_turns(ways, arguments.rounds)
    print(table(title, ways))
    first, gap = statistics.median(ours.first[1:]), max(ours.gaps, default=0.0)
    print(f"jem's first batch after {first:.2f} s (median), the first of a following epoch within {gap:.2f} s (most);")
    often, most = np.quantile(ours.waits, 0.95), max(ours.waits)
    print(f"in mid-epoch the next batch within {often:.2f} s (19 of 20) and {most:.2f} s (most)\n")


def peaks(folder: str, times: int) -> tuple[float, float]:
    """Peak MB of this process tree, without what it shares, and of the object store, over one epoch of `times` x."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    index = open_index([str(file) for _ in range(times) for file in sorted(Path(folder).glob("*.parquet"))])
    done = threading.Event()
    own: list[float] = []
    store: list[float] = []

    def sample() -> None:
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not done.wait(0.2):
            own.append(sum(_private_memory(each) for each in [psutil.Process(), *psutil.Process().children(True)]))
            store.append(get_memory_info_reply(state).store_stats.object_store_bytes_used)

    with own_ray():
        sampler = threading.Thread(target=sample)
        sampler.start()
        images = Ours(index, 256, 1)()
        done.set()
        sampler.join()
    assert images == len(index) // BATCH * BATCH  # carried over, if there were another epoch
    return max(own) / 1e6, max(store) / 1e6


def _private_memory(process: psutil.Process) -> float:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0.0
    return float(memory.rss - memory.shared)


def memory(folder: str) -> None:
    """Print the peaks of the data set and of 20 times as much, each in a process tree of its own."""
    print("| epoch of | process memory, MB | object store, MB |\n| --- | --- | --- |")
    found = []
    for times in (1, MORE):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(peaks, (folder, times)))
        print(f"| {PHOTOS * times} photographs | {found[-1][0]:.0f} | {found[-1][1]:.0f} |", flush=True)
    ratios = [after / before for before, after in zip(*found, strict=True)]
    print(f"{MORE} x the data takes {ratios[0]:.2f} x the process memory, {ratios[1]:.2f} x the object store\n")


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """The Ray that `jem pretrain` starts on one machine, silent."""
    with connect(ClusterConfig()):
        quieten()
        yield


def quieten() -> None:
    """Neither progress bars nor a report of each execution."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextlib.contextmanager
def memory_folder() -> Iterator[str]:
    """A folder for data, in memory where that can be had: a disk is not what is measured."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The stream beside others")
    parser.add_argument("what", nargs="*", default=["photos", "cifar10", "memory"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    with memory_folder() as folder:
        if {"photos", "memory"} & set(arguments.what):
            photographs(Path(folder), PHOTOS)
        if "memory" in arguments.what:
            memory(folder)
        with own_ray():
            if "photos" in arguments.what:
                compare("photographs to 256", folder, 256, arguments)
            if "cifar10" in arguments.what:
                compare("CIFAR-10", str((SHARED / "cifar10/train").resolve()), 32, arguments)


if __name__ == "__main__":
    main()
