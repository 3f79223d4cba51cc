"""From a data set and an encoder to features, on Ray Data: tasks decode, a pool of actors encodes.

Few images are decoded and encoded by the process that wants their features: tasks and actors take longer to start.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import torch

from jem.ahead import Ahead
from jem.data.read import as_batch, read_group
from jem.data.scheduling import read_blocks
from jem.data.stream import BLOCK_BYTES, dataset
from jem.device import use_cpu
from jem.errors import InputError, RunError
from jem.evaluate.judge import Features
from jem.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from jem.config import StreamConfig
    from jem.data.index import Index
    from jem.encoder import Encoder

Arrays = dict[str, "NDArray[Any]"]

DEADLINE = 300.0
"""Seconds in which the next features must come, the start of the actors included."""
SET = "set"
"""Column that says which data set a row is from."""
HERE = 2**22
"""Pixels that all encoders take, up to which the images are few: some 10 s of a core for a ResNet-18."""
GPU_ACTOR_CPUS = 0.25
"""CPUs that an actor with a GPU reserves: it only feeds it."""


def extract_features(
    encoder: Encoder,
    index: Index,
    stream: StreamConfig,
    batch_size: int,
    actors: int = 1,
    *,
    gpu: bool = False,
    deadline: float = DEADLINE,
) -> Features:
    """Encode a whole data set, in float32 and evaluation mode.

    Args:
        encoder: left as it is; each actor has a copy.
        index: of the data set.
        stream: `canvas`, `decode_cpus` and `pixel_limit` are used.
        batch_size: images per forward pass.
        actors: copies of the encoder that work at once.
        gpu: one GPU for each actor.
        deadline: seconds in which the next features must come.

    Returns:
        Features of every image, by ascending id.

    Raises:
        InputError: the cluster cannot hold the actors and a decode task.
        RunError: an image cannot be decoded, rows are missing, or nothing came before the deadline.
    """
    return extract_all([encoder], [index], stream, batch_size, actors, gpu=gpu, deadline=deadline)[0][0]


def extract_all(
    encoders: Sequence[Encoder],
    indexes: Sequence[Index],
    stream: StreamConfig,
    batch_size: int,
    actors: int = 1,
    *,
    gpu: bool = False,
    replace: bool = False,
    share: float = 1.0,
    deadline: float = DEADLINE,
) -> list[list[Features]]:
    """Encode several data sets with several encoders in one pass: each image is decoded once, the actors start once.

    Arguments and errors as in `extract_features`. With `replace` others stand in for the images that cannot be had;
    `share` is the part of the cluster's CPUs that may be used. Without a GPU, few images need neither tasks
    nor actors.

    Returns:
        One list for each encoder, with the features of each data set.
    """
    count = sum(len(index) for index in indexes)
    if not gpu and count * sum(encoder.input_size**2 for encoder in encoders) <= HERE:
        blocks = _encoded_here(encoders, indexes, stream, batch_size, replace=replace)
    else:
        first, *rest = [
            dataset(
                index,
                stream.canvas,
                stream.pixel_limit,
                decode_cpus=stream.decode_cpus,
                replace=replace,
                marks={SET: number},
            )
            for number, index in enumerate(indexes)
        ]
        images = first.union(*rest) if rest else first
        encoded = _encoded(images, encoders, stream, batch_size, actors, gpu=gpu, share=share)
        blocks = within(encoded, deadline)
    parts: list[list[Arrays]] = [[] for _ in indexes]
    with Progress("features", count) as progress:
        for block in blocks:
            for number in np.unique(block[SET]):
                here = block[SET] == number
                parts[number].append({name: column[here] for name, column in block.items()})
            progress.update(len(block["id"]))
    sets = [_sorted(part, index) for part, index in zip(parts, indexes, strict=True)]
    return [
        [Features(each[_column(number)], each["label"], each["id"]) for each in sets] for number in range(len(encoders))
    ]


def _sorted(parts: list[Arrays], index: Index) -> dict[str, torch.Tensor]:
    """The columns of one data set by ascending id, complete."""
    count = sum(len(part["id"]) for part in parts)
    if count != len(index):
        raise RunError(f"{count} of {len(index)} images of {index.uri} came back encoded: run it again")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["id"], kind="stable")
    return {name: torch.from_numpy(column[order]) for name, column in columns.items()}


def encode(
    encoder: Encoder, index: Index, stream: StreamConfig, batch_size: int, actors: int = 1, *, gpu: bool = False
) -> ray.data.Dataset:
    """The data set in storage order, each row `id` int64, `label` int64 and `embedding` float32 (D,); lazily.

    Arguments as in `extract_features`.

    Raises:
        InputError: the cluster cannot hold the actors and a decode task.
    """
    images = dataset(index, stream.canvas, stream.pixel_limit, decode_cpus=stream.decode_cpus)
    return _encoded(images, [encoder], stream, batch_size, actors, gpu=gpu)


def _encoded(
    images: ray.data.Dataset,
    encoders: Sequence[Encoder],
    stream: StreamConfig,
    batch_size: int,
    actors: int,
    *,
    gpu: bool,
    share: float = 1.0,
) -> ray.data.Dataset:
    cpus, threads = plan_cpus(actors, stream.decode_cpus, gpu=gpu, share=share)
    copies = [copy.deepcopy(encoder).cpu().requires_grad_(False) for encoder in encoders]
    return images.map_batches(
        _EncodeActor,
        fn_constructor_args=(ray.put(copies), threads, gpu),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=1 if gpu else 0,
    )


def _encoded_here(
    encoders: Sequence[Encoder], indexes: Sequence[Index], stream: StreamConfig, batch_size: int, *, replace: bool
) -> Iterator[Arrays]:
    """The same blocks without Ray."""
    encode = _Encode(encoders, torch.device("cpu"))
    for number, index in enumerate(indexes):
        for group in range(len(index.rows)):
            for block in read_group(index, group, stream.canvas, stream.pixel_limit, BLOCK_BYTES, replace=replace):
                marked = {**block, SET: np.full(len(block["id"]), number)}
                for low in range(0, len(block["id"]), batch_size):
                    yield encode({name: column[low : low + batch_size] for name, column in marked.items()})


def plan_cpus(actors: int, decode_cpus: float, *, gpu: bool, share: float = 1.0) -> tuple[float, int]:
    """CPUs that each actor reserves, so that decoding always has a place beside them, and the threads that it uses.

    They are planned for in a `share` of the cluster's CPUs.

    Raises:
        InputError: the cluster cannot hold the actors and a decode task.
    """
    has = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = has.get("CPU", 0.0) * share, has.get("GPU", 0.0)
    if gpu and gpus < actors:
        raise InputError(
            f"the cluster has {gpus:g} GPUs and {actors} encoder actors want one each: use fewer actors, or no GPU"
        )
    # Half of the CPUs at most: Ray waits for ever, without a word, when actors leave none for the tasks before them.
    each = min(GPU_ACTOR_CPUS if gpu else 1.0, (cpus - decode_cpus) / actors, max(cpus / 2, 0.1) / actors)
    each = int(each * 100) / 100  # Ray counts in ten-thousandths, and adds up what it rounds
    if each <= 0:
        raise InputError(
            f"the cluster has {cpus:g} CPUs, too few for {actors} encoder actors and a decode task of {decode_cpus:g}: "
            "use fewer actors, or lower stream.decode_cpus"
        )
    return each, max(
        1, min(int(cpus / actors), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 64)
    )


def stream_of(trained: Mapping[str, Any], stream: StreamConfig) -> StreamConfig:
    """`stream`, with the canvas that an encoder was trained with in place of the default one.

    Args:
        trained: the configuration of the encoder's training, as `encoder.json` has it, or {}.
        stream: a canvas other than the default is kept.
    """
    own = trained.get("stream", {}).get("canvas")
    if own is None or stream.canvas != type(stream).model_fields["canvas"].default:
        return stream
    return stream.model_copy(update={"canvas": int(own)})


class _Encode:
    """Decoded images in, features of each encoder out."""

    def __init__(self, encoders: Sequence[Encoder], device: torch.device) -> None:
        self._device = device
        self._encoders = [
            copy.deepcopy(encoder).eval().to(device).to(memory_format=torch.channels_last) for encoder in encoders
        ]

    @torch.inference_mode()
    def __call__(self, rows: Arrays) -> Arrays:
        batch = as_batch(rows)
        images = batch.image.to(self._device)
        kept = {name: rows[name] for name in ("id", "label", SET) if name in rows}
        features = [encoder(images, batch.size).float().cpu().numpy() for encoder in self._encoders]
        return kept | {_column(number): array for number, array in enumerate(features)}


class _EncodeActor(_Encode):
    """One of the pool."""

    def __init__(self, encoders: ray.ObjectRef[list[Encoder]], threads: int, gpu: bool) -> None:
        use_cpu(min(threads, os.cpu_count() or 1))
        stored: list[Encoder] = ray.get(encoders)  # read-only, and shared: each actor has copies
        super().__init__(stored, torch.device("cuda" if gpu else "cpu"))


def _column(encoder: int) -> str:
    return f"embedding_{encoder}" if encoder else "embedding"


# --- waiting --------------------------------------------------------------------------------------------------------


def within(rows: ray.data.Dataset, deadline: float) -> Iterator[Arrays]:
    """The blocks of a data set, each of which must come within so many seconds.

    Raises:
        RunError: nothing came in time, or the work failed; our own errors within Ray's are brought to light.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would report each of its executions
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")  # of a small data set
    with Ahead(lambda: read_blocks(rows), 4, "jem-extract") as ahead:
        while (block := _next(ahead, deadline)) is not None:
            yield block


def _next(ahead: Ahead[Arrays], deadline: float) -> Arrays | None:
    try:
        return ahead.take(deadline)
    except TimeoutError:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        raise RunError(
            f"no features came for {deadline:g} s: of the cluster's resources {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs are free; check the cluster with `ray status`, or use fewer actors"
        ) from None
    except Exception as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """Our own error within Ray's, which names the remedy, or else Ray's as one line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError | RunError):
            return type(seen)(str(seen.args[0]))
        seen = getattr(seen, "cause", None) or seen.__cause__
    return RunError(f"encoding failed: {' '.join(str(error).split())[-300:]}")
