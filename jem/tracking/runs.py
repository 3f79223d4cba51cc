"""One MLflow run per training run: the driver begins and ends it, rank 0 logs its metrics in the background.

The driver creates the run and passes its id, so a restarted worker or a resumed job goes on in the same one. After the
start nothing here raises: tracking never stops training. What could not be logged is counted and warned about.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar

from pydantic import BaseModel

from jem.credentials import stripped, without_credentials
from jem.errors import InputError
from jem.tracking.store import connect, sqlite_file, store_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from jem.config import TrackConfig

P = ParamSpec("P")
T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]
_log = logging.getLogger(__name__)
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100  # the server's limits
_PENDING = 200_000  # points held while the server is away: hours of training, tens of MB
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts to reach a store that is away."""
_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST"}


class Tracker:
    """The driver's side: begins, describes and ends runs.

    Raises:
        InputError: the store cannot be reached or written, within seconds.
    """

    def __init__(self, track: TrackConfig) -> None:
        # of a server it would print two addresses when a run ends: `where` says it
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self.uri = store_uri(track.uri)
        self.client: MlflowClient = connect(self.uri)
        self._experiment = track.experiment

    def start_run(self, name: str, params: BaseModel | Mapping[str, Any], tags: Mapping[str, str] | None = None) -> str:
        """Begin a run and return its id; `params` (a job's configuration) are stored flat, without credentials.

        Raises:
            InputError: the experiment was deleted, or the store refused.
        """
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            described = {"mlflow.source.name": "jem", **_user(), **(tags or {})}
            run = self.client.create_run(self._experiment_id(), run_name=name, tags=described)
            run_id: str = run.info.run_id
            items = [Param(key, value) for key, value in flat_params(params).items()]
            for start in range(0, len(items), _PARAMS_PER_BATCH):
                self.client.log_batch(run_id, params=items[start : start + _PARAMS_PER_BATCH])
        except MlflowException as error:
            raise InputError(
                f"MLflow at {self.uri} did not take the run: {_line(error)}; check --track.uri and --track.experiment"
            ) from error
        return run_id

    def resume_run(self, run_id: str) -> None:
        """Go on with a run that was interrupted.

        Raises:
            InputError: the store does not know it.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise InputError(
                f"no run {run_id} in MLflow at {self.uri} ({_line(error)}): "
                "give the tracking store that it was started with, in --track.uri or MLFLOW_TRACKING_URI"
            ) from error

    def children(self, run_id: str) -> dict[str, Run]:
        """The runs below one, by their tag jem.name.

        Raises:
            InputError: the store cannot be asked.
        """
        from mlflow.exceptions import MlflowException

        try:
            experiment = self.client.get_run(run_id).info.experiment_id
            found: dict[str, Run] = {}
            token: str | None = None
            while True:
                page = self.client.search_runs(
                    [experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=1000, page_token=token
                )
                found |= {run.data.tags.get("jem.name", ""): run for run in page}
                token = page.token
                if not token:
                    return found
        except MlflowException as error:
            raise InputError(
                f"MLflow at {without_credentials(self.uri)} did not list the runs below {run_id}: {_line(error)}"
            ) from error

    def finish(self, run_id: str, status: Status = "FINISHED") -> None:
        """End a run."""
        self._safely(self.client.set_terminated, run_id, status=status)

    def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        """Set or replace tags."""
        for key, value in tags.items():
            self._safely(self.client.set_tag, run_id, key, str(value))

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log a few metrics at once, such as a final evaluation's."""
        from mlflow.entities import Metric

        now = _now()
        points = [Metric(metric_key(key), float(value), now, step) for key, value in metrics.items()]
        self._safely(self.client.log_batch, run_id, metrics=points)

    def log_artifact(self, run_id: str, path: str | Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all that is in it, under the run's `folder`."""
        from pathlib import Path

        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        self._safely(log, run_id, str(path), folder)

    def log_dict(self, run_id: str, content: Mapping[str, Any], path: str) -> None:
        """Store a dictionary as `path`, which ends in .json or .yaml."""
        self._safely(self.client.log_dict, run_id, dict(content), path)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Store text as `path`."""
        self._safely(self.client.log_text, run_id, text, path)

    def log_figure(self, run_id: str, figure: Figure, path: str) -> None:
        """Store a picture as `path`, which ends in .png."""
        self._safely(self.client.log_figure, run_id, figure, path)

    def log_image(self, run_id: str, image: Any, path: str) -> None:
        """Store a PIL image or a uint8 array (H, W, 3) as `path`, which ends in .png."""
        self._safely(self.client.log_image, run_id, image, path)

    def history(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Every metric's curve: (step, value), by step. What cannot be read is left out, with a warning."""
        run = self._safely(self.client.get_run, run_id)
        curves = {}
        for key in sorted(run.data.metrics) if run else ():
            points = self._safely(self.client.get_metric_history, run_id, key) or []
            curves[key] = sorted((point.step, point.value) for point in points)
        return curves

    def where(self, run_id: str) -> str:
        """Where to look at the run: an address, or the command that serves the store."""
        if self.uri.startswith(("http://", "https://")):
            run = self._safely(self.client.get_run, run_id)
            page = f"/#/experiments/{run.info.experiment_id}/runs/{run_id}" if run else ""
            return without_credentials(self.uri).rstrip("/") + page
        return f"mlflow ui --backend-store-uri {without_credentials(self.uri)}"

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            file = sqlite_file(self.uri)
            # beside the database, not in whatever the working directory is (and a server has a place of its own)
            location = None if file is None else str(file.parent / "mlruns" / re.sub(r"[^\w.-]", "_", self._experiment))
            try:
                return self.client.create_experiment(self._experiment, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # someone else was quicker
                    raise
                found = self.client.get_experiment_by_name(self._experiment)
        if found is None or found.lifecycle_stage == "deleted":
            raise InputError(
                f"the MLflow experiment {self._experiment} was deleted: give another in --track.experiment, "
                "or restore it with mlflow experiments restore"
            )
        return str(found.experiment_id)

    def _safely(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is not worth the training run)
            name = getattr(call, "__name__", "call").replace("_", " ")
            _log.warning("tracking: %s failed and is skipped: %s", name, _line(error))
            return None


class _Point(NamedTuple):
    key: str
    value: float
    time: int
    step: int


class MetricLog:
    """Rank 0's side: metrics to the store in batches, from a thread of its own.

    One curve after a restart: points at or before the last step that the store already has for their key are dropped,
    because a job that goes on from a checkpoint repeats the steps after it. So flush before a checkpoint is
    reported, or the steps between the last batch sent and the checkpoint are missing from the curve.

    While the store is away, points wait for it (the oldest are given up beyond 200,000).

    Args:
        uri: of the store.
        run_id: of the run, which is there.
        say: gets a line when the store is away, when it is back, and when points were lost.
    """

    def __init__(self, uri: str, run_id: str, say: Callable[[str], None] = _log.warning) -> None:
        self.lost = 0
        """Points that could not be logged, so far."""
        self._say = say
        self._away = self._hurry = False
        self._uri, self._run_id = uri, run_id
        self._pending: deque[_Point] = deque()
        self._sending = 0
        self._changed = threading.Condition()
        self._closed = False
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name="metric-log", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue metrics of a step; returns at once and never raises."""
        now = _now()
        with self._changed:
            for key, value in metrics.items():
                self._pending.append(_Point(metric_key(key), float(value), now, step))
            while len(self._pending) > _PENDING:
                self._pending.popleft()
                self.lost += 1
            self._changed.notify_all()

    def flush(self, seconds: float = 30.0) -> bool:
        """Wait until all that was logged is stored, at most `seconds` and while the store answers; whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._stored() or self._away, timeout=seconds)
            return self._stored()

    def close(self, seconds: float = 30.0) -> None:
        """Wait until all is stored, and stop; points that are not stored by then are lost, and said to be."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(self._stored, timeout=seconds)
            self._closed = True
            self.lost += 0 if done else len(self._pending) + self._sending
            self._changed.notify_all()
        if self.lost:
            self._say(f"tracking: {self.lost} metric points could not be logged to {self._shown}")

    def _stored(self) -> bool:
        return not self._pending and not self._sending

    @property
    def _shown(self) -> str:
        return without_credentials(self._uri)

    def _send_all(self) -> None:
        client: MlflowClient | None = None
        last_steps: dict[str, int] = {}
        pause = FIRST_PAUSE
        while batch := self._next_batch():
            try:
                if client is None:
                    client, last_steps = self._begin()
                self._send(client, [point for point in batch if point.step > last_steps.get(point.key, -1)])
            except Exception as error:  # noqa: BLE001  (whatever it is, the points wait or are counted)
                self._return(batch, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._hurry, timeout=pause)
                    if self._hurry:  # the end is near: no long pauses any more
                        self._changed.wait_for(lambda: self._closed, timeout=FIRST_PAUSE)
                pause = min(LONGEST_PAUSE, 2 * pause)
            else:
                pause = FIRST_PAUSE
                self._done()

    def _begin(self) -> tuple[MlflowClient, dict[str, int]]:
        from mlflow import MlflowClient

        file = sqlite_file(self._uri)
        if file is not None and not file.exists():  # opening it would create another store, on this node alone
            raise FileNotFoundError(f"{file} is not there on this node: several nodes need an MLflow server")
        client = MlflowClient(self._uri, self._uri)
        latest = client.get_run(self._run_id).data.to_proto().metrics
        return client, {metric.key: metric.step for metric in latest}

    def _send(self, client: MlflowClient, batch: list[_Point]) -> None:
        from mlflow.entities import Metric

        if batch:
            client.log_batch(self._run_id, metrics=[Metric(p.key, p.value, p.time, p.step) for p in batch])

    def _next_batch(self) -> list[_Point]:
        """The next points, when there are some; none once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            if self._closed:
                return []
            count = min(len(self._pending), _METRICS_PER_BATCH)
            batch = [self._pending.popleft() for _ in range(count)]
            self._sending = count
            return batch

    def _done(self) -> None:
        with self._changed:
            self._sending = 0
            if self._away:
                self._say(f"tracking: metrics reach {self._shown} again")
            self._away = False
            self._changed.notify_all()

    def _return(self, batch: list[_Point], error: Exception) -> None:
        """Put a batch back that was not taken, unless it never will be."""
        with self._changed:
            self._sending = 0
            if getattr(error, "error_code", None) in _PERMANENT:
                self.lost += len(batch)
            else:
                self._pending.extendleft(reversed(batch))
                self._away = True
            if not self._warned:
                self._warned = True
                self._say(f"tracking: metrics do not reach {self._shown}, training goes on: {_line(error)}")
            self._changed.notify_all()


def flat_params(config: BaseModel | Mapping[str, Any]) -> dict[str, str]:
    """A configuration as MLflow's params: dotted keys, lists as JSON, URIs without credentials."""
    content = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                add(f"{prefix}.{key}", item)
        else:
            clean = stripped(value)
            flat[metric_key(prefix)] = clean if isinstance(clean, str) else json.dumps(clean)

    for key, item in content.items():
        add(str(key), item)
    return flat


def metric_key(key: str) -> str:
    """A name that every MLflow store takes: other characters than letters, digits and `_-. /` become `_`."""
    return re.sub(r"[^\w\-. /]", "_", key, flags=re.ASCII)[:250]


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user without a name
        return {}


def _now() -> int:
    return int(time.time() * 1000)


def _line(error: BaseException) -> str:
    return without_credentials(" ".join(str(error).split()))[:200] or type(error).__name__
