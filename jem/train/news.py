"""What a train worker tells and is told: metrics, words for the driver, checkpoints, lost images, notices."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.preemption import PreemptionInfo

from jem.data.read import why_lost
from jem.data.storage import one_line
from jem.errors import RunError
from jem.tracking.runs import MetricLog
from jem.train import checkpoint
from jem.train.checkpoint import State
from jem.train.profile import TABLE, TRACE, Measured
from jem.train.watch import Summary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jem.train.job import Job

ANSWER_SECONDS = 30.0
FLUSH_SECONDS = 10.0
UPLOAD_TRIES, UPLOAD_PAUSE = 4, 1.0
"""Of a checkpoint; seconds before the second try, then twice as many each time."""
GRACE_SECONDS = 30.0
"""Between SIGTERM to a worker and its end, as Kubernetes has it."""


class News:
    """What rank 0 tells: metrics to MLflow, progress and words to the driver. The other ranks are silent."""

    def __init__(self, job: Job, mailbox: Any) -> None:
        self._storage, self._mailbox = job.storage, mailbox
        self._mine = ray.train.get_context().get_world_rank() == 0
        self._log = MetricLog(job.tracking_uri, job.run_id, self.say) if self._mine else None
        self._latest: dict[str, float] = {}
        self.lost = 0
        """Images that could not be read, so far."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers of one step, for MLflow; at an epoch's end the driver gets the latest too."""
        if self._log is not None:
            self._log.log(values | ({"stream/lost": self.lost} if self.lost else {}), step)
            self._latest |= values
            if "epoch" in values:
                self._mailbox.put.remote("epoch", self._latest)
                self._latest = {}

    def progress(self, images: int, info: dict[str, float]) -> None:
        """So many more images were trained on."""
        if self._mine:
            shown = {key: f"{value:.0%}" if key == "waiting" else f"{value:.4g}" for key, value in info.items()}
            self._mailbox.put.remote("progress", (images, shown))

    def say(self, message: str) -> None:
        """A line for the user."""
        if self._mine:
            self._mailbox.put.remote("say", message)

    def profile(self, measured: Measured, trace: Path) -> None:
        """Where a step's time goes; the files are the driver's to save."""
        table = measured.table()
        for name, content in ((TABLE, f"{table}\n".encode()), (TRACE, trace.read_bytes())):
            # waited for, so that they are there before the run is over
            ray.get(self._mailbox.put.remote("file", (name, content)), timeout=ANSWER_SECONDS)
        self.say(f"where a step's time goes:\n{table}")

    def at(self, step: int, images: int, workers: int) -> None:
        """The run goes on from a checkpoint."""
        if self._mine:
            self._mailbox.put.remote("at", images)
            self.say(f"going on from step {step} with {workers} worker(s)")

    def keep(self, state: State | None, step: int, summary: Summary, *, wait: bool = False) -> None:
        """Hand a checkpoint to Ray Train, which uploads it in the background, unless to `wait`. All ranks call it."""
        name = f"step-{step:08d}"
        if state is None:
            ray.train.report(summary, checkpoint=None, checkpoint_dir_name=name)
            return
        if self._log is not None:
            # What comes before the checkpoint is not repeated by a run that goes on from it.
            self._log.flush(FLUSH_SECONDS)
        try:
            folder = Path(tempfile.mkdtemp(prefix="jem-checkpoint-"))
            checkpoint.save(state, folder)
        except OSError as error:
            raise RunError(f"{name} cannot be written to {tempfile.gettempdir()} ({one_line(error)})") from error
        ray.train.report(
            summary,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC
            if wait
            else ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, kept: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """As Ray Train does it; a storage that is full or gone ends the run, and is not tried with each restart."""
        storage = get_train_context().storage_context
        for attempt in range(UPLOAD_TRIES):
            try:
                return storage.persist_current_checkpoint(kept, name)
            except (OSError, RuntimeError, pa.ArrowException) as error:
                if attempt + 1 == UPLOAD_TRIES:
                    reason = f"{name} cannot be written to {self._storage} ({one_line(error)})"
                    ray.get(self._mailbox.give_up.remote(reason), timeout=ANSWER_SECONDS)
                    raise RunError(reason) from error
                time.sleep(UPLOAD_PAUSE * 2**attempt)
        raise AssertionError

    def close(self, seconds: float) -> None:
        """Wait so long for what MLflow has not yet; what it does not get is told."""
        if self._log is not None:
            self._log.close(seconds)


class Announced:
    """Asks for a checkpoint at once: when the loss of a worker is announced, or their number is to change."""

    def __init__(self, news: News, mailbox: Any) -> None:
        self._news, self._mailbox = news, mailbox
        self._context = get_train_context()
        # ray.train.get_preemption_info would be a meeting of all workers, which the loop has already
        self._announced: PreemptionInfo | None = None
        self._first = self._context.get_world_rank() == 0
        self._wish = self._answered = 0
        self._reply = mailbox.state.remote() if self._first else None

    def given(self) -> bool:
        """Whether it is wanted now. Never waits."""
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._wish, self._news.lost = ray.get(self._reply)
            self._reply = self._mailbox.state.remote()
        announced = self._context.preemption_context.preemption_info
        return announced != self._announced or self._wish > self._answered

    def keep(self, state: State | None, step: int, summary: Summary) -> None:
        """Keep a checkpoint, and return when it is stored."""
        announced = self._context.preemption_context.preemption_info
        self._news.keep(state, step, summary, wait=True)
        if announced is not None and announced != self._announced:
            self._news.say(f"a worker will be lost: a checkpoint of step {step} is kept")
        self._announced, self._answered = announced, self._wish
        if self._first:
            self._mailbox.answer.remote(self._answered)


class Losses:
    """Counts the images that this worker could not get, with the others' and up to the limit."""

    def __init__(self, job: Job, mailbox: Any) -> None:
        self._job, self._mailbox = job, mailbox
        self._known: set[int] = set()
        self._shards: dict[str, str] = {}

    def __call__(self, positions: NDArray[np.int64]) -> None:
        """Count those at these positions, once each, whatever the epoch.

        Raises:
            RunError: There are too many.
        """
        new = set(positions.tolist()) - self._known
        if not new:
            return
        index, stream = self._job.index, self._job.config.stream
        shards: dict[str, str] = {}
        for position in new:
            name = index.files[index.file[np.searchsorted(index.start, position, side="right") - 1]]
            if name not in self._shards:
                self._shards[name] = shards[name] = why_lost(index, position, stream.canvas, stream.pixel_limit)
        self._known |= new
        total: int = ray.get(self._mailbox.lose.remote(sorted(new), shards), timeout=ANSWER_SECONDS)
        if total > stream.max_lost * len(index):
            raise RunError(
                f"{total} of {len(index)} images are lost, more than stream.max_lost {stream.max_lost:g} allows: "
                f"{self._shards[name]}"
            )


class OnTerm(WorkerCallback):
    """Takes SIGTERM to a train worker for what it means, as Ray Train takes the announced loss of a node.

    The workers keep a checkpoint, and are started again when the grace is over, if this one still lives then.
    """

    def after_init_train_context(self) -> None:
        """Called by Ray Train on each worker, in the main thread."""

        def note(*_: object) -> None:
            context = get_train_context()
            node = ray.get_runtime_context().get_node_id()
            deadline = int(1000 * (time.time() + GRACE_SECONDS))
            context.preemption_context.preemption_info = PreemptionInfo(deadline, {node: [context.get_world_rank()]})

        signal.signal(signal.SIGTERM, note)
