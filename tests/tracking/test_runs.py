"""Runs in MLflow: one run and one curve through restarts, quick refusals at the start, silence in training's way."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from jem.config import PretrainConfig, TrackConfig
from jem.errors import InputError
from jem.tracking import runs
from jem.tracking.runs import MetricLog, Tracker, flat_params, metric_key
from jem.tracking.store import connect, store_uri, within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory) -> TrackConfig:
    folder = tmp_path_factory.mktemp("tracking")
    return TrackConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="runs of tests")


@pytest.fixture(scope="module")
def tracker(track: TrackConfig) -> Tracker:
    return Tracker(track)


@pytest.fixture
def run_id(tracker: Tracker) -> str:
    return tracker.start_run("a run", {"seed": 0})


# --- the driver's side --------------------------------------------------------------------------------------------


def test_a_run_keeps_its_configuration_flat_and_without_credentials(tracker: Tracker) -> None:
    config = PretrainConfig(
        data="s3://user:secret@bucket/train?region=eu&X-Amz-Signature=secret",
        track=TrackConfig(uri="https://user:secret@tracking.example"),
    )
    run = tracker.client.get_run(tracker.start_run("named", config, {"jem.kind": "test"}))
    assert run.info.run_name == "named"
    assert run.info.status == "RUNNING"
    assert run.data.tags["jem.kind"] == "test"
    assert run.data.params["data"] == "s3://bucket/train?region=eu"
    assert run.data.params["track.uri"] == "https://tracking.example"
    assert run.data.params["optimizer.name"] == "lars"
    assert json.loads(run.data.params["method.expander"]) == [2048, 2048, 2048]
    assert "secret" not in json.dumps(run.data.params)


def test_artifacts_lie_beside_a_sqlite_store(tracker: Tracker, track: TrackConfig, run_id: str) -> None:
    database = str(track.uri).removeprefix("sqlite:///")
    place = str(tracker.client.get_run(run_id).info.artifact_uri)
    assert place.startswith(database.replace("mlflow.db", "mlruns/runs_of_tests/"))


def test_a_run_goes_on_under_its_id_and_ends(tracker: Tracker, track: TrackConfig, run_id: str) -> None:
    tracker.finish(run_id, "FAILED")
    assert tracker.client.get_run(run_id).info.status == "FAILED"
    again = Tracker(track)  # a restarted driver
    again.resume_run(run_id)
    assert again.client.get_run(run_id).info.status == "RUNNING"
    again.finish(run_id)
    assert tracker.client.get_run(run_id).info.status == "FINISHED"


def test_an_unknown_run_cannot_be_resumed(tracker: Tracker) -> None:
    with pytest.raises(InputError, match="no run 0000"):
        tracker.resume_run("0000")


def test_a_deleted_experiment_is_named(track: TrackConfig) -> None:
    gone = track.model_copy(update={"experiment": "gone"})
    tracker = Tracker(gone)
    tracker.start_run("x", {})
    tracker.client.delete_experiment(tracker.client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(InputError, match="gone was deleted"):
        tracker.start_run("x", {})


def test_what_is_logged_is_there(tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.log_artifact(run_id, tmp_path / "folder", "things")
    tracker.log_artifact(run_id, tmp_path / "folder" / "a.txt")
    tracker.log_dict(run_id, {"k": 1}, "config.json")
    tracker.log_text(run_id, "words", "words.txt")
    tracker.log_figure(run_id, Figure(), "pictures/empty.png")
    tracker.log_image(run_id, np.zeros((4, 4, 3), np.uint8), "pictures/black.png")
    tracker.set_tags(run_id, {"jem.collapse": 0})
    tracker.log_metrics(run_id, {"final/knn": 0.5}, step=7)
    paths = {
        item.path for folder in (None, "things", "pictures") for item in tracker.client.list_artifacts(run_id, folder)
    }
    expected = {"things/a.txt", "a.txt", "config.json", "words.txt", "pictures/empty.png", "pictures/black.png"}
    assert expected <= paths
    assert tracker.client.get_run(run_id).data.tags["jem.collapse"] == "0"
    assert tracker.history(run_id) == {"final/knn": [(7, 0.5)]}
    assert str(tracker.uri) in tracker.where(run_id)


def test_nothing_raises_once_the_run_has_begun(
    tracker: Tracker, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        tracker.log_artifact("no such run", tmp_path / "no such file")
        tracker.log_dict("no such run", {}, "x.json")
        tracker.set_tags("no such run", {"a": "b"})
        tracker.log_metrics("no such run", {"a": 1.0})
        tracker.finish("no such run")
        assert tracker.history("no such run") == {}
    assert caplog.text.count("failed and is skipped") == 6


# --- rank 0's side ------------------------------------------------------------------------------------------------


def test_every_point_arrives_once_and_in_order(tracker: Tracker, run_id: str) -> None:
    log = MetricLog(tracker.uri, run_id)
    for step in range(1500):  # more than one batch
        log.log({"train/loss": 1.0 / (step + 1), "train/lr": 0.1}, step)
    assert log.flush(60)
    log.close()
    history = tracker.history(run_id)
    assert history["train/loss"] == [(step, 1.0 / (step + 1)) for step in range(1500)]
    assert len(history["train/lr"]) == 1500
    assert log.lost == 0


def test_a_restart_makes_one_curve(tracker: Tracker, run_id: str) -> None:
    """Rank 0 dies at step 57 after a checkpoint at 50, and repeats what followed; another key is logged less often."""
    first = MetricLog(tracker.uri, run_id)
    for step in range(58):
        first.log({"train/loss": float(step)}, step)
        if step % 20 == 0:
            first.log({"eval/knn": step / 100}, step)
    first.close()
    second = MetricLog(tracker.uri, run_id)
    for step in range(50, 101):
        second.log({"train/loss": -1.0 if step <= 57 else float(step)}, step)
        if step % 20 == 0:
            second.log({"eval/knn": step / 100}, step)
    second.close()
    history = tracker.history(run_id)
    assert history["train/loss"] == [(step, float(step)) for step in range(101)]
    assert history["eval/knn"] == [(step, step / 100) for step in range(0, 101, 20)]


def test_values_that_are_no_numbers_do_not_stop_the_rest(tracker: Tracker, run_id: str) -> None:
    log = MetricLog(tracker.uri, run_id)
    log.log({"a": float("nan"), "b": float("inf"), "odd name: 100 %": 1.0}, 0)
    log.log({"a": 1.0}, 1)
    log.close()
    history = tracker.history(run_id)
    assert history["a"][1] == (1, 1.0)
    assert np.isnan(history["a"][0][1])
    assert history["odd name_ 100 _"] == [(0, 1.0)]
    assert log.lost == 0


class Flaky:
    """A client whose first calls fail as those of a server that is away do."""

    def __init__(self, client: Any, failures: int, error: Exception) -> None:
        self._client, self._failures, self._error = client, failures, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> Any:
        if self._failures:
            self._failures -= 1
            raise self._error
        return self._client.log_batch(*args, **kwargs)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FIRST_PAUSE", 0.01)


@pytest.mark.usefixtures("no_pause")
def test_points_wait_while_the_server_is_away(
    tracker: Tracker, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin = MetricLog._begin
    flaky: list[Flaky] = []

    def begin_flaky(self: MetricLog) -> Any:
        client, steps = begin(self)
        flaky.append(Flaky(client, 3, ConnectionError("away")))
        return flaky[0], steps

    monkeypatch.setattr(MetricLog, "_begin", begin_flaky)
    log = MetricLog(tracker.uri, run_id)
    for step in range(30):
        log.log({"train/loss": float(step)}, step)
    log.close(60)
    assert tracker.history(run_id)["train/loss"] == [(step, float(step)) for step in range(30)]
    assert log.lost == 0
    assert caplog.text.count("training goes on") == 1  # said once, not for each failure
    assert caplog.text.count("again") == 1


def test_a_checkpoint_does_not_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricLog(f"sqlite:///{tmp_path}/elsewhere.db", "some-run", said.append)
    log.log({"a": 1.0, "b": 2.0}, 0)
    assert not log.flush(100_000)
    assert not log.flush(100_000)
    log.close(0.1)
    assert ["do not reach" in said[0], "2 metric points could not be logged" in said[1]] == [True, True]


@pytest.mark.usefixtures("no_pause")
def test_what_is_lost_is_counted_and_said(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(tracker.uri, "no-such-run")
    log.log({"a": 1.0, "b": 2.0}, 0)
    log.flush(60)
    log.close()
    assert log.lost == 2
    assert "2 metric points could not be logged" in caplog.text


def test_a_store_that_is_not_there_is_not_made_on_this_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(f"sqlite:///{tmp_path}/elsewhere.db", "some-run")
    log.log({"a": 1.0}, 0)
    log.close(0.5)
    assert log.lost == 1
    assert not (tmp_path / "elsewhere.db").exists()
    assert "several nodes need an MLflow server" in caplog.text


def test_memory_is_bounded_while_nothing_can_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PENDING", 100)
    log = MetricLog(f"sqlite:///{tmp_path}/elsewhere.db", "some-run")
    for step in range(500):
        log.log({"a": 1.0}, step)
    log.close(0.1)
    assert log.lost == 500


# --- the store ----------------------------------------------------------------------------------------------------


def test_the_uri_is_the_given_one_then_the_environments_then_sqlite_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert store_uri("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    assert store_uri("sqlite:////abs/x.db") == "sqlite:////abs/x.db"
    assert store_uri() == "http://tracking.example:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store_uri() == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "/tmp/mlruns", "foo://bar"])
def test_stores_that_mlflow_cannot_write_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="sqlite:///"):
        store_uri(uri)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_server_that_is_not_there_is_refused_without_retries(closed_port: int) -> None:
    """The refused connection itself is the message: with MLflow's own retries it would be the deadline's."""
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+ cannot be used .*refused.*--track.uri") as caught:
        Tracker(TrackConfig(uri=f"http://user:secret@127.0.0.1:{closed_port}"))
    assert "secret" not in str(caught.value)


def test_a_server_that_says_nothing_is_refused_after_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)  # takes connections and never answers
        with pytest.raises(InputError, match=r"did not answer|timed out|timeout"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)


@contextlib.contextmanager
def server_that_answers(status: int, content_type: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "content_type", "words"),
    [
        (403, "text/plain", "refused .403.*--allowed-hosts"),
        (401, "text/plain", "refused .401.*MLFLOW_TRACKING_USERNAME"),
        (404, "text/html", "does not answer as an MLflow server"),
        (200, "text/html", "does not answer as an MLflow server"),
        (500, "application/json", "status 500"),
    ],
)
def test_a_server_that_refuses_or_is_another_is_named(status: int, content_type: str, words: str) -> None:
    with server_that_answers(status, content_type) as address, pytest.raises(InputError, match=words):
        connect(address)


def test_a_server_that_answers_is_taken() -> None:
    with server_that_answers(200, "application/json") as address:
        assert connect(address).tracking_uri == address


def test_a_store_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri in (f"sqlite:///{tmp_path}/file/mlflow.db", f"sqlite:///{tmp_path}"):
        with pytest.raises(InputError, match=r"--track\.uri"):
            connect(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_call_that_does_not_end_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, never.wait)
    never.set()
    assert within(10, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(10, lambda: {}["missing"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(content=st.dictionaries(st.text("abc", min_size=1, max_size=3), values, max_size=4))
def test_flat_params_hold_every_leaf(content: dict[str, Any]) -> None:
    flat = flat_params(content)

    def look(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                look(f"{prefix}.{key}" if prefix else key, item)
        else:
            assert flat[metric_key(prefix)] == (value if isinstance(value, str) else json.dumps(value))

    for key, value in content.items():
        look(key, value)
