"""Decoded images kept in Ray's object store, for data sets that fit: each is decoded once, not once an epoch.

The order is the plan's and the batches are those of `stream.ray_batches`. Every node that trains comes to hold all
images, each of its workers reads them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from jem.ahead import Ahead
from jem.data.read import Arrays, Rows, as_batch
from jem.data.stream import DEADLINE, cause, waited
from jem.errors import InputError, RunError
from jem.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jem.batch import Batch
    from jem.config import StreamConfig
    from jem.data.index import Index
    from jem.data.plan import Plan, Position

STORE_SHARE = 0.6
"""Of a node's object store that the images may take; the rest is for everything else."""


@dataclass(frozen=True)
class Cache:
    """The decoded images of a data set."""

    groups: Sequence[ray.ObjectRef[Arrays]]
    """Those of each row group of the index, in storage order."""


def check_cache(index: Index, stream: StreamConfig, stores: Sequence[float]) -> None:
    """Check that the decoded images fit.

    Args:
        index: Of the data set.
        stream: `canvas` and `cache`, GB, are used.
        stores: Bytes of each node's object store.

    Raises:
        InputError: They do not; with the sizes.
    """
    assert stream.cache is not None
    needed = len(index) * stream.canvas**2 * 3
    if needed > stream.cache * 1e9:
        raise InputError(
            f"{len(index)} images of {stream.canvas} x {stream.canvas} pixels take {needed / 1e9:.3g} GB decoded, more "
            f"than stream.cache {stream.cache:g}: raise it, lower stream.canvas, or leave the cache out"
        )
    if needed > STORE_SHARE * min(stores):
        raise InputError(
            f"{len(index)} decoded images take {needed / 1e9:.3g} GB, more than {STORE_SHARE:.0%} of the smallest "
            f"node's object store of {min(stores) / 1e9:.3g} GB: give Ray more (--object-store-memory), lower "
            "stream.canvas, or leave stream.cache out"
        )


def fill(index: Index, stream: StreamConfig, deadline: float = DEADLINE) -> Cache:
    """Decode all images, by tasks anywhere in the cluster. The images live as long as the process that called this.

    Args:
        index: Of the data set.
        stream: `canvas`, `decode_cpus` and `pixel_limit` are used.
        deadline: Seconds in which the next row group must be done.

    Raises:
        RunError: An image cannot be decoded, a shard cannot be read, or nothing was done before the deadline.
    """
    decode: Any = ray.remote(num_cpus=stream.decode_cpus, num_returns=2)(_decode)
    shared = ray.put(index)
    made = [decode.remote(shared, group, stream.canvas, stream.pixel_limit) for group in range(len(index.rows))]
    waiting = [count for count, _ in made]
    with Progress("cache", len(index)) as progress:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=deadline)
            if not done:
                raise RunError(waited(deadline, stream))
            try:
                progress.update(ray.get(done[0]))
            except ray.exceptions.RayError as error:
                raise cause(error) from error
    return Cache([arrays for _, arrays in made])


def cached_batches(
    index: Index,
    plan: Plan,
    stream: StreamConfig,
    rank: int,
    start: Position,
    stop_epoch: int,
    *,
    cache: Cache,
    pin_memory: bool = False,
    deadline: float = DEADLINE,
) -> Iterator[Batch]:
    """One worker's batches from a position on: those of `stream.ray_batches`, whose other arguments these are.

    Raises:
        RunError: Images were lost with their node and could not be made again, or did not come before the deadline.
    """

    def batches() -> Iterator[Batch]:
        for window in plan.windows(rank, start, stop_epoch):
            groups, rows = plan.order(window)
            for low in range(0, len(groups), plan.batch_per_worker):
                part = slice(low, low + plan.batch_per_worker)
                yield as_batch(_gather(cache, groups[part], rows[part], deadline), pin_memory=pin_memory)

    expected = plan.total_steps(stop_epoch) - plan.number(start)
    with Ahead(batches, stream.prefetch, "jem-cache") as ahead:
        for _ in range(expected):
            try:
                batch = ahead.take(deadline)
            except (ray.exceptions.RayError, TimeoutError) as error:
                reason = cause(error)
                raise type(reason)(f"the cached images cannot be had ({reason}): go on with --resume") from error
            assert batch is not None
            yield batch


def _decode(index: Index, group: int, canvas: int, pixel_limit: int) -> tuple[int, Arrays]:
    """How many images a row group has, and the images."""
    count = int(index.rows[group])
    rows = Rows(index, np.full(count, group), np.arange(count))
    return count, rows.decode(0, count, canvas, pixel_limit)


def _gather(cache: Cache, groups: np.ndarray, rows: np.ndarray, deadline: float) -> Arrays:
    """The arrays of these rows of these row groups, (n,) each."""
    numbers, where = np.unique(groups, return_inverse=True)
    found: list[dict[str, Any]] = ray.get([cache.groups[number] for number in numbers], timeout=deadline)
    arrays = {name: np.empty((len(rows), *array.shape[1:]), array.dtype) for name, array in found[0].items()}
    for number, source in enumerate(found):
        here = np.flatnonzero(where == number)
        for name, array in source.items():
            arrays[name][here] = array[rows[here]]
    return arrays
