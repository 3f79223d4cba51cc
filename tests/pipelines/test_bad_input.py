"""Bad input to the jobs: one line with cause and remedy, exit status 2, nothing written."""

from __future__ import annotations

import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jem.config import TrackConfig
from jem.tracking.runs import Tracker
from pipelines.command import main

VIEWS = ("--stream.canvas", "32", "--augment.views", '[{"count": 2, "size": 32}]')
RUN = (*VIEWS, "--train.batch_size", "32")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which nothing may appear."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return folder


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str) -> str:
    """The one line that the command printed."""
    before = sorted(path.name for path in folder.iterdir())
    assert main(argv) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line]
    assert len(lines) == 1, printed.err
    assert sorted(path.name for path in folder.iterdir()) == before, "something was written"
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "cause", "remedy"),
    [
        (("--data", "nosuch"), "nosuch", "jem ingest"),
        (("--data", "empty"), "empty", "Parquet"),
        (("--data", "rows.parquet"), "rows.parquet", "image"),
        (("--data", "text.parquet"), "text, label", "image"),
        (("--data", "DIGITS", "--trian.epochs", "3"), "trian.epochs", "train.epochs"),
        (("--data", "DIGITS", "--train.batch_size", "-8"), "train.batch_size", "greater than 0"),
        (("--data", "DIGITS", "--train.batch_size", "2", "--cluster.workers", "4"), "smaller than", "fewer workers"),
        (("--data", "DIGITS", "--train.batch_size", "1"), "variance", "at least 2"),
        (("--data", "DIGITS", "--train.batch_size", "4096"), "4096", "lower it"),
        (("--data", "DIGITS", "--storage", "/dev/null/runs"), "/dev/null/runs is not writable", "--storage"),
        (("--data", "DIGITS", "--name", "../out"), "'../out' cannot name a run", "use letters"),
        (("--data", "DIGITS", "--resume", "nosuch"), "no run nosuch", "there are none"),
        (("--data", "DIGITS", "--recipe", "vicreg-cifar"), "vicreg-cifar", "vicreg-cifar10"),
        (("--data", "DIGITS", "--method.name", "supervised", "--test", "unlabelled.parquet"), "no labels", "--test"),
        ((), "data is missing", "--data"),
    ],
)
def test_pretrain_refuses_it_in_one_line(argv, cause, remedy, capsys, empty_folder, digits_dataset):
    (empty_folder / "empty").mkdir()
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array([], image)}), empty_folder / "rows.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), empty_folder / "text.parquet")
    cell = pa.array([{"bytes": b"", "path": ""}], image)
    pq.write_table(pa.table({"image": cell}), empty_folder / "unlabelled.parquet")
    argv = [str(digits_dataset) if word == "DIGITS" else word for word in argv]
    given = [] if "--recipe" in argv else VIEWS if "--train.batch_size" in argv else RUN
    line = refusal(capsys, empty_folder, "pretrain", *given, *argv)
    assert cause in line
    assert remedy in line


@pytest.mark.ray
@pytest.mark.parametrize(
    ("argv", "cause", "remedy"),
    [
        (("--cluster.workers", "16"), "has 1 node(s), 4 CPUs, 0 GPUs, which holds 8 of 16 workers x 0.5 CPUs", "lower"),
        (("--cluster.gpu", "true"), "holds 0 of 1 workers x 0.5 CPUs and 1 GPU", "cluster.gpu false"),
        (("--cluster.cpus_per_worker", "4"), "leave 0 CPUs for decoding", "lower cluster.workers"),
        (("--track.uri", "http://127.0.0.1:PORT"), "http://127.0.0.1:PORT", "--track.uri"),
    ],
)
def test_pretrain_refuses_what_the_cluster_or_mlflow_cannot_do(
    argv, cause, remedy, capsys, empty_folder, digits_dataset, ray_cluster
):
    with socket.socket() as free:  # bound, so that no one else takes it, but not listening
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        argv = [word.replace("PORT", port) for word in argv]
        line = refusal(capsys, empty_folder, "pretrain", "--data", str(digits_dataset), *RUN, *argv)
    assert cause.replace("PORT", port) in line
    assert remedy in line


@pytest.mark.parametrize(
    "argv",
    [
        ("evaluate", "--encoder", "models:/nosuch@champion", "--data", "DIGITS", "--test", "DIGITS"),
        ("embed", "--encoder", "models:/nosuch/1", "--data", "DIGITS", "--out", "embeddings"),
        ("encoders", "show", "models:/nosuch@champion"),
        ("encoders", "pull", "models:/nosuch", "dest"),
    ],
)
def test_an_unknown_encoder_is_refused_in_one_line(argv, capsys, empty_folder, digits_dataset):
    argv = [str(digits_dataset) if word == "DIGITS" else word for word in argv]
    assert "nothing is registered in" in refusal(capsys, empty_folder, *argv), "without a store, none is made"
    Tracker(TrackConfig())
    assert "nosuch" in refusal(capsys, empty_folder, *argv)


def test_a_ray_address_where_nothing_answers_is_refused_in_one_line(capsys, empty_folder, digits_dataset, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        line = refusal(
            capsys, empty_folder, "pretrain", "--data", str(digits_dataset), *RUN, "--cluster.address", address
        )
    assert f"no Ray cluster answers at {address}" in line
    assert "leave both out" in line
