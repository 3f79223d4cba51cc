"""How Ray Data runs an execution, made to fit a stream: it starts at once, goes round when there is something to do.

Ray Data schedules an execution in a thread of the process that reads it. That thread is made for long pipelines on many
nodes; beside a training it must take little of the processor, and between two short tasks little time.
"""

from __future__ import annotations

import logging
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data.exceptions import ExecutionTimeoutError

from jem.ahead import CLOSED, give_way

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jem.data.read import Arrays

REST_SECONDS, REST_TIMES = 0.5, 100
"""Longest rest of Ray Data's scheduling thread; how many times as long as its work."""
BREATH_SECONDS = 0.005
"""Its shortest."""
QUIET = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""Loggers that would report every execution, and that it has no progress bar."""
_DECODED: ContextVar[threading.Event | None] = ContextVar("decoded", default=None)
"""In a thread that reads a span: set as soon as all of it is decoded."""
_PACED: ContextVar[bool] = ContextVar("paced", default=False)
"""In the scheduling thread of an execution with a `_Pace`."""


def manifest(rows: list[dict[str, Any]], blocks: int, block_bytes: int) -> ray.data.Dataset:
    """A data set with settings of its own, those of the process stay as they are; it makes blocks of `block_bytes`.

    Not `from_arrow`: that asks tasks of a whole CPU each what is in the tables, and waits for ever where none is free.
    """
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    listed = ray.data.from_items(rows, override_num_blocks=blocks)
    context = listed.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = block_bytes
    context.custom_execution_callback_classes.append(_Start)
    return listed


def read_blocks(rows: ray.data.Dataset, decoded: threading.Event | None = None) -> Iterator[Arrays]:
    """The blocks of a data set, without copies; closing the `Ahead` that reads them ends the execution.

    Args:
        rows: made from a `manifest`.
        decoded: set as soon as all of it is decoded, which is before the last block is taken.
    """
    _DECODED.set(decoded)
    rows.context.custom_execution_callback_classes.append(_Pace)
    made = iter(rows.iter_batches(batch_size=None, prefetch_batches=0))
    while (block := _readers.take(made)) is not None:
        yield block


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
