"""The stream on Ray Data: tasks anywhere in the cluster read and decode, each train worker takes its batches in order.

One row of these Ray data sets is one *batch*: so Ray never cuts a batch or joins two, and a batch is a tensor in the
object store, without a copy. A decode task sends several of them as one block, which costs Ray as much as a block of
one. What is read is a manifest of windows (`plan.py`), a few integers each. Long runs are cut into spans of windows,
one execution each, of which the next begins as soon as the last has nothing left to decode, while its batches are
taken: no gap between epochs, no millions of objects at the start, and never more decode tasks than were asked for.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy

from jem.ahead import CLOSED, END_SECONDS, POLL_SECONDS, Ahead
from jem.data.plan import Plan, Position, Window
from jem.data.read import Arrays, as_batch, read_group, read_window, tell
from jem.data.scheduling import manifest, read_blocks
from jem.errors import RetryError, RunError
from jem.memory import keep_freed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from jem.batch import Batch, Views
    from jem.config import AugmentConfig, StreamConfig
    from jem.data.index import Index
    from jem.data.read import Told

    Execution: TypeAlias = Callable[[Sequence[Window]], ray.data.Dataset]
    MakeViews: TypeAlias = Callable[[Batch, Position], Views]

SPAN, FIRST_SPAN = 512, 64
"""Windows in one Ray Data execution; and in the first, for which the first batch waits: 1 ms for each."""
STORE_SHARE = 0.3
"""Of the object store, for all workers' streams together; Ray Data alone would take half of it for each."""
AHEAD_BYTES, BLOCKS_AHEAD = 96 * 2**20, 4
"""Decoded images for each decode task that wait to be used, and blocks at least: with fewer it would wait for room; and
to decode many seconds ahead at the start would take the processor from the training meanwhile."""
CHUNK_BYTES = 16 * 2**20
"""Decoded images in one block of the stream, if that is more than one batch."""
BLOCK_BYTES = 32 * 2**20
"""Decoded images in one block for evaluation and embedding."""
TASK_BYTES, TASK_IMAGES = 16 * 2**20, 2**13
"""Encoded images that a decode task reads, whichever is less: about 0.2 s of work, for which it pays to start one."""
DEADLINE = 300.0
"""Seconds in which a batch must come."""


def ray_batches(
    index: Index,
    plan: Plan,
    stream: StreamConfig,
    rank: int,
    start: Position,
    stop_epoch: int,
    *,
    decode_tasks: int,
    pin_memory: bool = False,
    told: Told | None = None,
    deadline: float = DEADLINE,
) -> Iterator[Batch]:
    """One worker's batches from a position to the end of the epoch before `stop_epoch`, in the plan's order.

    They are `plan.positions(start, stop_epoch)`, one by one; `local_batches` gives the same ones without Ray. Closing
    the iterator ends the decoding.

    Args:
        index: Of the data set.
        plan: The order.
        stream: `canvas`, `decode_cpus`, `prefetch` and `pixel_limit` are used.
        rank: Of this worker in the plan's world.
        start: First step wanted.
        stop_epoch: First epoch not wanted.
        decode_tasks: How many at a time, at most, for this worker.
        pin_memory: Put the batches into page-locked memory.
        told: Gets the positions of images that cannot be had, others stand in for them; without it they end the stream.
        deadline: Seconds in which each batch must come, the first one included.

    Raises:
        RunError: An image cannot be decoded, a shard cannot be read, or no batch came before the deadline.
        RetryError: Ray lost what was decoded, such as with a node.
    """

    def execution(windows: Sequence[Window]) -> ray.data.Dataset:
        return _decoded(index, plan, stream, windows, decode_tasks, replace=told is not None)

    for row in _rows(plan, rank, start, stop_epoch, execution, decode_tasks, stream, deadline):
        tell(row, told)
        yield as_batch(row, pin_memory=pin_memory)


def views_batches(
    index: Index,
    plan: Plan,
    stream: StreamConfig,
    rank: int,
    start: Position,
    stop_epoch: int,
    *,
    decode_tasks: int,
    augment: AugmentConfig,
    make: Callable[[], MakeViews],
    told: Told | None = None,
    deadline: float = DEADLINE,
) -> Iterator[Views]:
    """Like `ray_batches`, but actors of Ray Data make the views too (`augment.placement: pool`).

    `make` is called once in each of `augment.pool_actors` actors and returns what makes the views of the batch at a
    position; they come back as float32. The other arguments are those of `ray_batches`.
    """

    def execution(windows: Sequence[Window]) -> ray.data.Dataset:
        return _decoded(index, plan, stream, windows, decode_tasks, replace=told is not None).map_batches(
            _ViewMaker,
            fn_constructor_args=(make,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=augment.pool_actors),
            num_cpus=augment.pool_cpus,
            num_gpus=augment.pool_gpus,
        )

    import torch

    from jem.batch import Views

    for row in _rows(plan, rank, start, stop_epoch, execution, decode_tasks, stream, deadline):
        tell(row, told)
        kept = {name: torch.from_numpy(np.array(array)) for name, array in row.items()}
        numbers = range(sum(name.startswith("view_") for name in row))
        masks = [kept.get(f"mask_{number}") for number in numbers]
        masked = any(mask is not None for mask in masks)
        views = [kept[f"view_{number}"].permute(0, 3, 1, 2) for number in numbers]
        yield Views(views, kept["id"], kept["label"], masks if masked else None)


def dataset(
    index: Index,
    canvas: int,
    pixel_limit: int,
    *,
    decode_cpus: float = 0.25,
    replace: bool = False,
    marks: Mapping[str, int] | None = None,
) -> ray.data.Dataset:
    """All images once, in storage order, one per row: for evaluation and embedding.

    Columns are `image` uint8 (S, S, 3), `size` int32 (2,) height and width before squashing, `id` and `label` int64,
    and `marks`, each of which has one value in all rows. With `replace` others stand in for the images that cannot be
    had, whose positions are in the column `lost`.
    """

    def decode(manifest: pa.Table) -> Iterator[Arrays]:
        _keep_freed()
        for group in manifest.column("group").to_pylist():
            for arrays in read_group(index, group, canvas, pixel_limit, BLOCK_BYTES, replace=replace):
                count = len(arrays["id"])
                yield arrays | {name: np.full(count, value) for name, value in (marks or {}).items()}

    together = -(-len(index.rows) // (8 * SPAN))  # so that even a very large set has few thousand tasks
    groups = [{"group": group} for group in range(len(index.rows))]
    tasks = -(-len(groups) // together)
    return manifest(groups, tasks, BLOCK_BYTES).map_batches(
        decode, batch_format="pyarrow", batch_size=None, num_cpus=decode_cpus
    )


# --- executions -------------------------------------------------------------------------------------------------------


def _decoded(
    index: Index, plan: Plan, stream: StreamConfig, windows: Sequence[Window], tasks: int, *, replace: bool
) -> ray.data.Dataset:
    """One block of windows per task in, one row per batch out, each with its epoch and step."""
    canvas, pixel_limit = stream.canvas, stream.pixel_limit
    batch_bytes = plan.batch_per_worker * canvas * canvas * 3
    together = max(1, min(CHUNK_BYTES // batch_bytes, plan.window_steps()))

    def decode(manifest: pa.Table) -> Iterator[Arrays]:
        _keep_freed()
        for row in manifest.column("window").to_pylist():
            window = Window.of(json.loads(row))
            step = window.step + window.skip
            for arrays in read_window(index, plan, window, canvas, pixel_limit, together, replace=replace):
                count = len(arrays["id"])
                yield {**arrays, "epoch": np.full(count, window.epoch), "step": np.arange(step, step + count)}
                step += count

    rows = [{"window": json.dumps(asdict(window))} for window in windows]
    images = min(TASK_IMAGES, TASK_BYTES * plan.total / index.bytes.sum())
    each = max(1, round(images / (plan.window_steps() * plan.batch_per_worker)))
    blocks = -(-len(rows) // each)
    # Ray joins what is not larger than this, and cuts what is half as large again: so it leaves ours as they are.
    listed = manifest(rows, blocks, together * batch_bytes)
    store = _cluster()[0].get("object_store_memory", 0.0) * STORE_SHARE / plan.world
    store = min(store, tasks * max(AHEAD_BYTES, BLOCKS_AHEAD * together * batch_bytes))
    listed.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=store)
    return listed.map_batches(
        decode,
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=stream.decode_cpus,
        compute=TaskPoolStrategy(size=min(tasks, blocks)),
    )


def _keep_freed() -> None:
    """In a decode task; Arrow's own allocators give back what a task had read, and the next one begins with faults."""
    keep_freed()
    pa.set_memory_pool(pa.system_memory_pool())


class _ViewMaker:
    """The actor of `views_batches`: one batch in, its views out."""

    def __init__(self, make: Callable[[], MakeViews]) -> None:
        self._make = make()

    def __call__(self, row: Arrays) -> Arrays:
        batch = as_batch({name: array[0] for name, array in row.items()})
        made = self._make(batch, Position(int(row["epoch"][0]), int(row["step"][0])))
        views = [view.float().permute(0, 2, 3, 1).cpu().contiguous().numpy() for view in made.views]
        masks = {f"mask_{n}": mask.cpu().numpy()[None] for n, (_, mask) in enumerate(made) if mask is not None}
        kept: Arrays = {name: row[name] for name in ("id", "label", "lost", "epoch", "step") if name in row}
        return {**{f"view_{number}": view[None] for number, view in enumerate(views)}, **masks, **kept}


# --- iteration --------------------------------------------------------------------------------------------------------


def _rows(
    plan: Plan,
    rank: int,
    start: Position,
    stop_epoch: int,
    execution: Execution,
    tasks: int,
    stream: StreamConfig,
    deadline: float,
) -> Iterator[Arrays]:
    """The rows of one execution after the other, the next one begun while the last batches of one are taken."""
    windows = plan.windows(rank, start, stop_epoch)
    expected = plan.positions(start, stop_epoch)
    lead = max(8, 2 * tasks)
    current: _Span | None = None
    following = _Span.begin(windows, min(SPAN, FIRST_SPAN), execution, stream.prefetch, None)
    try:
        while following is not None:
            current, following = following, None
            due = sum(len(window) for window in current.windows[:-lead])
            for taken in range(current.batches):
                if taken == due:
                    following = _Span.begin(windows, SPAN, execution, stream.prefetch, current)
                row = current.next(deadline, stream)
                position = Position(int(row["epoch"]), int(row["step"]))
                if position != (wanted := next(expected)):
                    raise RunError(f"Ray Data delivered {position} in place of {wanted}: start again with --resume")
                yield row
            current.end()
    finally:
        for span in (following, current):
            if span is not None:
                span.close()


class _Span:
    """One execution, read ahead."""

    def __init__(self, windows: list[Window], execution: Execution, ahead: int, before: threading.Event | None) -> None:
        self.windows = windows
        self.batches = sum(len(window) for window in windows)
        self.decoded = threading.Event()
        self._rows = Ahead(lambda: self._read(execution, before), ahead, "jem-stream")

    @classmethod
    def begin(
        cls, windows: Iterator[Window], count: int, execution: Execution, ahead: int, before: _Span | None
    ) -> _Span | None:
        """Take the next windows, if there are any, and start to decode them when those `before` are decoded."""
        some = list(islice(windows, count))
        return cls(some, execution, ahead, before.decoded if before is not None else None) if some else None

    def _read(self, execution: Execution, before: threading.Event | None) -> Iterator[Arrays]:
        """The rows, one by one; no copies."""
        rows, closed = execution(self.windows), CLOSED.get()
        while before is not None and not before.wait(POLL_SECONDS):
            if closed is not None and closed.is_set():
                return
        for block in read_blocks(rows, self.decoded):
            for at in range(len(block["step"])):
                yield {name: array[at] for name, array in block.items()}

    def next(self, deadline: float, stream: StreamConfig) -> Arrays:
        """The next row."""
        try:
            row = self._rows.take(deadline)
        except TimeoutError:
            raise RunError(waited(deadline, stream)) from None
        except Exception as error:
            raise cause(error) from error
        if row is None:
            raise RunError("the stream ended before its last batch: start the run again with --resume")
        return row

    def end(self) -> None:
        """After the last batch: let the execution end by itself; cut short, it would keep that batch for a while."""
        with contextlib.suppress(Exception):  # whatever goes wrong now, all batches have come
            self._rows.take(END_SECONDS)
        self.close()

    def close(self) -> None:
        """End the execution; the next one need not wait for it."""
        self.decoded.set()
        self._rows.close()


def _cluster() -> tuple[dict[str, float], dict[str, float]]:
    """What the cluster has, and what of it is free."""
    return dict(ray.cluster_resources()), dict(ray.available_resources())  # type: ignore[no-untyped-call]


def waited(deadline: float, stream: StreamConfig) -> str:
    """Why nothing may have come before the deadline, and what helps."""
    has, free = _cluster()
    return (
        f"no batch came for {deadline:g} s: one decode task asks for {stream.decode_cpus:g} CPUs, the cluster has "
        f"{has.get('CPU', 0):g}, of which {free.get('CPU', 0):g} are free; check the cluster and the storage, or lower "
        f"cluster.workers, cluster.cpus_per_worker or stream.decode_cpus"
    )


def cause(error: BaseException) -> RunError:
    """Our own error within Ray's, which names the image and the remedy; or else Ray's in one line: a `RetryError`."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) is RunError:  # Ray's copies of it are subclasses, whose text is a traceback
            return RunError(str(inner).splitlines()[0])  # and it adds lines of advice about its own settings
        inner = getattr(inner, "cause", None) or inner.__cause__
    return RetryError(f"decoding failed: {(str(error).strip() or repr(error)).splitlines()[-1][:300]}")
