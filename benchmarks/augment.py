"""The views beside lightly and kornia: SimCLR's operations, two views of each image.

    pip install '.[bench]'
    python benchmarks/augment.py [cifar10 photos kornia gpu] [--rounds 3]

cifar10  from encoded bytes of CIFAR-10 to normalised float views of 32 px: jem's stream and augmentation, and lightly's
         DataLoader with 2 workers
photos   the same from photographs to views of 224 px
kornia   from one batch of uint8 images in memory to normalised float views, on the CPU
gpu      the same on a GPU, with BYOL's operations at 224 px, beside what the bandwidth of its memory would bear
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from itertools import count
from pathlib import Path

import kornia.augmentation as ka
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from alternate import Way, in_turns, table
from lightly.transforms import SimCLRTransform
from PIL import Image
from stream import PHOTOS, SHARED, TASKS, WORKERS, memory_folder, own_ray, photographs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from jem.augment.views import Augment, generator, prefetched
from jem.batch import Batch
from jem.config import AugmentConfig, BlurConfig, JitterConfig, PretrainConfig, StreamConfig, ViewConfig
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.stream import ray_batches
from jem.device import use_cpu
from pipelines.settings import load_config

BATCH = 256
CPU = torch.device("cpu")
JITTER = (0.8, 0.8, 0.8, 0.2)


def views(size: int) -> AugmentConfig:
    """SimCLR's two views: as lightly's, with blur at 224 px only, as its own CIFAR-10 benchmark does."""
    brightness, contrast, saturation, hue = JITTER
    jitter = JitterConfig(p=0.8, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    blur = BlurConfig(p=0.5, kernel=23) if size > 64 else None
    return AugmentConfig(views=(ViewConfig(count=2, size=size, jitter=jitter, blur=blur),))


# --- from encoded bytes ---------------------------------------------------------------------------------------------


def ours(index: Index, canvas: int, size: int, epochs: int) -> int:
    """The stream decodes, this process augments."""
    plan = Plan(index.rows, 0, BATCH, 1, 4)
    start = Position(0, 0)
    batches = ray_batches(index, plan, StreamConfig(canvas=canvas), 0, start, epochs, decode_tasks=TASKS)
    generators = (generator(0, *position, 0) for position in plan.positions(start, epochs))
    return sum(len(batch) for batch, _ in prefetched(batches, generators, Augment(views(size)), CPU))


class Encoded(Dataset[tuple[list[Tensor], int]]):
    """Encoded images in memory, opened by Pillow and transformed one by one, as lightly's data sets do."""

    def __init__(self, index: Index, size: int) -> None:
        table = pa.concat_tables(pq.read_table(file, columns=["image", "label"]) for file in index.files)
        self._bytes = pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks])
        self._labels = table["label"].to_numpy()
        self._transform = SimCLRTransform(size, gaussian_blur=0.5 if size > 64 else 0.0)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, at: int) -> tuple[list[Tensor], int]:
        image = Image.open(io.BytesIO(self._bytes[at].as_py())).convert("RGB")
        return self._transform(image), int(self._labels[at])


def from_bytes(title: str, folder: str, canvas: int, size: int, epochs: int, lightlys: int, rounds: int) -> None:
    """Print the table of a data set; lightly's epochs are of `lightlys` batches, its workers already started."""
    index = open_index(folder)
    loader = DataLoader(
        Subset(Encoded(index, size), range(lightlys * BATCH)),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    ways = [
        Way("jem", lambda: ours(index, canvas, size, epochs), "augmentation"),
        Way("lightly", lambda: sum(len(label) for _, label in loader), "Pillow, image by image"),
    ]
    print(f"{title}: jem {epochs} epochs of {len(index)} images, lightly {lightlys} batches", flush=True)
    in_turns(ways, rounds)
    print(table(title, ways) + "\n")


# --- from a batch in memory -----------------------------------------------------------------------------------------


def kornias(view: ViewConfig, config: AugmentConfig) -> nn.Module:
    """The same operations, each with its parameters for each image; the jitter's order is one for the batch."""
    assert view.jitter is not None
    jitter = view.jitter
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    operations: list[nn.Module] = [
        ka.RandomResizedCrop((view.size, view.size), scale=view.scale),
        ka.RandomHorizontalFlip(p=view.flip),
        ka.ColorJitter(*factors, p=jitter.p),
        ka.RandomGrayscale(p=view.grey),
    ]
    if view.blur is not None:
        kernel = (view.blur.kernel, view.blur.kernel)
        operations.append(ka.RandomGaussianBlur(kernel, view.blur.sigma, p=view.blur.p))
    if view.solarize:
        operations.append(ka.RandomSolarize(thresholds=0.0, additions=0.0, p=view.solarize))  # from 0.5 + 0 on
    operations.append(ka.Normalize(torch.tensor(config.mean), torch.tensor(config.std)))
    return nn.Sequential(*operations)


def in_memory(device: torch.device, config: AugmentConfig, images: int, canvas: int, repeats: int, rounds: int) -> None:
    """Print the table of jem and kornia on one batch, two views of each image."""
    augment, cuda = Augment(config), device.type == "cuda"
    made = torch.randint(0, 256, (images, canvas, canvas, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    sizes = torch.full((images, 2), canvas, dtype=torch.int32)
    batch = Batch(made, sizes, torch.arange(images), torch.zeros(images, dtype=torch.int64))
    theirs = [kornias(view, config).to(device) for view in augment.views]
    numbers = count()

    def done() -> int:
        if cuda:
            torch.cuda.synchronize(device)
        return images * repeats

    def jem() -> int:
        for _ in range(repeats):
            augment(batch, generator(0, 0, next(numbers), 0), torch.bfloat16 if cuda else torch.float32)
        return done()

    def kornia() -> int:
        with torch.inference_mode():
            for _ in range(repeats):
                for view in theirs:
                    view(batch.image.to(torch.float32) / 255)
        return done()

    size = augment.views[0].size
    name = f"{canvas} to {size} px, {torch.cuda.get_device_name(device) if cuda else 'CPU'}"
    print(f"{name}: batches of {images}", flush=True)
    ways = [Way("jem", jem), Way("kornia", kornia)]
    in_turns(ways, rounds)
    print(table(name, ways))
    if cuda:
        least = canvas * canvas * 3 + len(theirs) * size * size * 3 * 2  # uint8 in, bfloat16 out
        limit = copied(device) / least
        kernels = images / kernel_seconds(lambda: augment(batch, generator(0, 0, 0, 0), torch.bfloat16))
        print(f"the device's memory would bear {limit:.0f} images/s, with bytes in and out once: jem reaches", end=" ")
        print(f"{ways[0].median / limit:.1%} of that, its kernels alone {kernels / limit:.1%} ({kernels:.0f} images/s)")
    print()


def copied(device: torch.device) -> float:
    """Bytes/s, read and written, of a large copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / kernel_seconds(lambda: target.copy_(source))


def kernel_seconds(run: Callable[[], object], times: int = 20) -> float:
    """Of the device, for `run` alone: the sum of its kernels, without the gaps between them."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / times / 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The views beside others")
    parser.add_argument("what", nargs="*", default=["cifar10", "photos", "kornia", "gpu"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    use_cpu(torch.get_num_threads())  # as a train worker does
    if "kornia" in arguments.what:
        in_memory(CPU, views(32), BATCH, 32, 8, arguments.rounds)
        in_memory(CPU, views(224), 64, 256, 1, arguments.rounds)
    if "gpu" in arguments.what and torch.cuda.is_available():
        byol = load_config(PretrainConfig, ["--recipe", "byol-imagenet", "--data", "none"]).augment
        in_memory(torch.device("cuda"), byol, BATCH, 256, 50, arguments.rounds)
        in_memory(torch.device("cuda"), views(32), 2 * BATCH, 32, 50, arguments.rounds)
    elif "gpu" in arguments.what:
        print("no GPU here: nothing is measured on one\n")
    if not {"cifar10", "photos"} & set(arguments.what):
        return
    with own_ray(), memory_folder() as folder:
        if "cifar10" in arguments.what:
            from_bytes("CIFAR-10", str((SHARED / "cifar10/train").resolve()), 32, 32, 2, 16, arguments.rounds)
        if "photos" in arguments.what:
            photographs(Path(folder), PHOTOS)
            from_bytes("photographs", folder, 256, 224, 1, 3, arguments.rounds)


if __name__ == "__main__":
    main()
