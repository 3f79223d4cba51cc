"""The stream on Ray Data: tasks anywhere in the cluster read and decode, each train worker takes its batches in order.

One row of these Ray data sets is one *batch*: so Ray never cuts a batch or joins two, and a batch is a tensor in the
object store, without a copy. A decode task sends several of them as one block, which costs Ray as much as a block of
one. What is read is a manifest of windows (`plan.py`), a few integers each. Long runs are cut into spans of windows,
one execution each, of which the next begins as soon as the last has nothing left to decode, while its batches are
taken: no gap between epochs, no millions of objects at the start, and never more decode tasks than were asked for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextvars import ContextVar
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data.exceptions import ExecutionTimeoutError

from jem.ahead import CLOSED, POLL_SECONDS, Ahead, give_way
from jem.data.plan import Plan, Position, Window
from jem.data.read import Arrays, Rows, as_batch, read_window, tell
from jem.errors import RetryError, RunError
from jem.memory import keep_freed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    from jem.batch import Batch, Views
    from jem.config import AugmentConfig, StreamConfig
    from jem.data.index import Index
    from jem.data.read import Told

    Execution: TypeAlias = Callable[[Sequence[Window]], ray.data.Dataset]
    MakeViews: TypeAlias = Callable[[Batch, Position], Views]

SPAN = 512
"""Windows in one Ray Data execution."""
STORE_SHARE = 0.3
"""Of the object store, for all workers' streams together; Ray Data alone would take half of it for each."""
BLOCKS_AHEAD = 4
"""Blocks for each decode task that wait to be used: to decode many seconds ahead at the start would take the processor
from the training meanwhile."""
CHUNK_BYTES = 16 * 2**20
"""Decoded images in one block of the stream, if that is more than one batch."""
BLOCK_BYTES = 32 * 2**20
"""Decoded images in one block for evaluation and embedding."""
TASK_BYTES, TASK_IMAGES = 16 * 2**20, 2**13
"""Encoded images that a decode task reads, whichever is less: about 0.2 s of work, for which it pays to start one."""
REST_SECONDS, REST_TIMES = 0.5, 100
"""Longest rest of Ray Data's scheduling thread; how many times as long as its work."""
BREATH_SECONDS = 0.005
"""Its shortest."""
DEADLINE = 300.0
"""Seconds in which a batch must come."""
QUIET = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""Loggers that would report every execution, and that it has no progress bar."""


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
    index: Index, canvas: int, pixel_limit: int, *, decode_cpus: float = 0.25, replace: bool = False
) -> ray.data.Dataset:
    """All images once, in storage order, one per row: for evaluation and embedding.

    Columns are `image` uint8 (S, S, 3), `size` int32 (2,) height and width before squashing, `id` and `label` int64.
    With `replace` others stand in for the images that cannot be had, whose positions are in the column `lost`.
    """
    per_block = max(1, BLOCK_BYTES // (canvas * canvas * 3))

    def decode(manifest: pa.Table) -> Iterator[Arrays]:
        _keep_freed()
        for group in manifest.column("group").to_pylist():
            count = int(index.rows[group])
            rows = Rows(index, np.full(count, group), np.arange(count), replace=replace)
            for low in range(0, count, per_block):
                yield rows.decode(low, low + per_block, canvas, pixel_limit)

    together = -(-len(index.rows) // (8 * SPAN))  # so that even a very large set has few thousand tasks
    groups = [{"group": group} for group in range(len(index.rows))]
    manifest = _manifest(groups, -(-len(groups) // together), BLOCK_BYTES)
    return manifest.map_batches(decode, batch_format="pyarrow", batch_size=None, num_cpus=decode_cpus)


def read_blocks(rows: ray.data.Dataset) -> Iterator[Arrays]:
    """The blocks of a data set, without copies; closing the `Ahead` that reads them ends the execution."""
    rows.context.custom_execution_callback_classes.append(_Pace)
    made = iter(rows.iter_batches(batch_size=None, prefetch_batches=0))
    while (block := _readers.take(made)) is not None:
        yield block


# --- executions -------------------------------------------------------------------------------------------------------


def _manifest(rows: list[dict[str, Any]], blocks: int, block_bytes: int) -> ray.data.Dataset:
    """A data set with settings of its own, those of the process stay as they are; it makes blocks of `block_bytes`.

    Not `from_arrow`: that asks tasks of a whole CPU each what is in the tables, and waits for ever where none is free.
    """
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    manifest = ray.data.from_items(rows, override_num_blocks=blocks)
    context = manifest.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = block_bytes
    context.custom_execution_callback_classes.append(_Start)
    return manifest


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
    manifest = _manifest(rows, blocks, together * batch_bytes)
    store = _cluster()[0].get("object_store_memory", 0.0) * STORE_SHARE / plan.world
    store = min(store, BLOCKS_AHEAD * tasks * together * batch_bytes)
    manifest.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=store)
    return manifest.map_batches(
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


class _Start(ExecutionCallback):
    """Asks in each round at the start what the cluster has, until the answer has come.

    Ray Data asks in its first round and looks at the answer a second later: until then it would start one task after
    the other.
    """

    def __init__(self) -> None:
        self._known = False

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data at the end of each round."""
        if not self._known:
            manager = executor._resource_manager  # noqa: SLF001 - nothing else tells
            self._known = manager.get_global_limits().cpu > 0
            manager._global_limits_last_update_time = 0.0  # noqa: SLF001 - as above


class _ClosedError(ExecutionTimeoutError):
    """Nobody reads what the execution makes. Of another kind Ray Data would print its trace, as a fault of its own."""


_DECODED: ContextVar[threading.Event | None] = ContextVar("decoded", default=None)
"""In a thread that reads a span: set as soon as all of it is decoded."""
_PACED: ContextVar[bool] = ContextVar("paced", default=False)
"""In the scheduling thread of an execution with a `_Pace`."""


class _EagerRay:
    """`ray` as Ray Data's scheduling knows it: in an execution of ours `wait` ends as soon as one task has something.

    Ray Data waits for all of them, or 0.1 s, for which there is no setting; and as it hears of a block, of what is in
    it and of the end of its task in a round each, a processor would have nothing to do for 0.3 s between two tasks.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    @staticmethod
    def wait(tasks: list[Any], *, num_returns: int, timeout: float, fetch_local: bool) -> tuple[list[Any], list[Any]]:
        """As `ray.wait`."""
        if _PACED.get():
            ray.wait(tasks, num_returns=1, timeout=timeout, fetch_local=fetch_local)
            timeout = 0.0
        return ray.wait(tasks, num_returns=num_returns, timeout=timeout, fetch_local=fetch_local)


streaming_executor_state.ray = _EagerRay()  # type: ignore[attr-defined, assignment]


class _Pace(ExecutionCallback):
    """Keeps Ray Data's scheduling thread from going round for nothing or too late, and ends it with its reader.

    It goes round as soon as a task has something (`_EagerRay`), and takes it at once: another thread of Ray Data's,
    which would ask what is in a block, would cost a round more.

    While nobody takes what is decoded it would go round and round without a pause, as its tasks have results which it
    may not take: beside a training step in the same process it took half of the time, and made the step three times
    slower. So it rests then a hundred times as long as a round took of the processor, or until a reader waits for it,
    and gives way to a training on a GPU.

    An execution ends when its reader leaves it, which a reader that waits for a block cannot. Without a free CPU it
    would outlive Ray, which ends the whole process then.
    """

    def __init__(self) -> None:
        self._used = 0.0
        self._closed: threading.Event | None = None
        self._decoded: threading.Event | None = None

    def before_execution_starts(self, executor: Any) -> None:
        """Called by Ray Data in the thread that reads."""
        executor._metadata_fetcher = InlineMetadataFetcher()  # noqa: SLF001 - otherwise for the whole process only
        self._closed, self._decoded = CLOSED.get(), _DECODED.get()

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data at the end of each round; an exception ends the execution, and goes to the reader."""
        if self._closed is not None and self._closed.is_set():
            raise _ClosedError
        operators = executor._topology  # noqa: SLF001 - nothing else tells
        if self._decoded is not None and all(operator.has_execution_finished() for operator in operators):
            self._decoded.set()
        _PACED.set(True)
        used = time.thread_time()
        _readers.waiting.wait(min(REST_SECONDS, REST_TIMES * (used - self._used)))
        time.sleep(BREATH_SECONDS)
        give_way()
        self._used = time.thread_time()


class _Readers:
    """The threads of this process that wait for Ray Data's next block."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        """Whether there are any."""
        self._count, self._lock = 0, threading.Lock()

    def take(self, blocks: Iterator[Arrays]) -> Arrays | None:
        """The next block, or None at the end."""
        self._add(1)
        try:
            return next(blocks, None)
        finally:
            self._add(-1)

    def _add(self, number: int) -> None:
        with self._lock:
            self._count += number
            (self.waiting.set if self._count else self.waiting.clear)()


_readers = _Readers()


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
    following = _Span.begin(windows, execution, stream.prefetch, None)
    try:
        while following is not None:
            current, following = following, None
            due = sum(len(window) for window in current.windows[:-lead])
            for taken in range(current.batches):
                if taken == due:
                    following = _Span.begin(windows, execution, stream.prefetch, current)
                row = current.next(deadline, stream)
                position = Position(int(row["epoch"]), int(row["step"]))
                if position != (wanted := next(expected)):
                    raise RunError(f"Ray Data delivered {position} in place of {wanted}: start again with --resume")
                yield row
            current.close()
    finally:
        for span in (following, current):
            if span is not None:
                span.close()


class _Span:
    """One execution, read ahead."""

    def __init__(self, windows: list[Window], execution: Execution, ahead: int, before: _Span | None) -> None:
        self.windows = windows
        self.batches = sum(len(window) for window in windows)
        self.decoded = threading.Event()
        self._rows = Ahead(lambda: self._read(execution, before), ahead, "jem-stream")

    @classmethod
    def begin(cls, windows: Iterator[Window], execution: Execution, ahead: int, before: _Span | None) -> _Span | None:
        """Take the next windows, if there are any, and start to decode them when those `before` are decoded."""
        some = list(islice(windows, SPAN))
        return cls(some, execution, ahead, before) if some else None

    def _read(self, execution: Execution, before: _Span | None) -> Iterator[Arrays]:
        """The rows, one by one; no copies."""
        rows, closed = execution(self.windows), CLOSED.get()
        while before is not None and not before.decoded.wait(POLL_SECONDS):
            if closed is not None and closed.is_set():
                return
        _DECODED.set(self.decoded)
        for block in read_blocks(rows):
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
