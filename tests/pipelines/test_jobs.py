"""Jobs sent to a Ray cluster of several nodes with `ray job submit`, from a folder that holds nothing of jem."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.cluster import Nodes, mlflow_server, ray_nodes, wait_for, write_images

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
JOB_SECONDS = 240.0
NOISE = re.compile(r"\r|\x1b|\*\*\*|Traceback|\(pid=|WARN|logging\.cc")
"""A bar's carriage return, colours, and what Ray would say beside the job."""
SETTINGS = {
    "stream": {"canvas": 32, "window": 1},
    "augment": {"views": [{"count": 2, "size": 32, "scale": [0.4, 1.0], "flip": 0.0}]},
    "backbone": {"name": "vit_tiny", "patch": 8},
    "method": {"name": "vicreg", "expander": [64, 64]},
    "optimizer": {"name": "adamw", "lr": 0.004},
    "schedule": {"warmup_epochs": 0.5},
    "train": {"epochs": 16, "batch_size": 64, "log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 2},
    # one to a node: it has 2 CPUs
    "cluster": {"workers": 2, "cpus_per_worker": 1.5},
    "evaluation": {"knn": {"k": 5}, "probe": None, "online": None, "random_baseline": False},
    "track": {"experiment": "jobs", "register_as": "jobs"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def nodes(place):
    with (
        mlflow_server(place / "mlflow", str(place / "mlflow" / "artifacts"), {}) as uri,
        ray_nodes(2, 2, {"MLFLOW_TRACKING_URI": uri, "RAY_JOB_STOP_WAIT_TIME_S": "60"}) as cluster,
    ):
        yield cluster


@pytest.fixture
def clean(tmp_path) -> Path:
    """Where the user submits from."""
    return tmp_path


def ended(job: subprocess.Popen[str]) -> str:
    output, _ = job.communicate(timeout=JOB_SECONDS)
    return output


@pytest.fixture(scope="module")
def dataset(nodes: Nodes, place: Path, digits_split, tmp_path_factory) -> Path:
    source = write_images(place / "pictures", digits_split[0][:200], digits_split[1][:200])
    clean = tmp_path_factory.mktemp("clean")
    command = ("python", "-m", "pipelines.ingest", str(source), str(place / "data"))
    job = nodes.submit("ingest", *command, cwd=clean)
    output = ended(job)
    assert job.returncode == 0, output
    assert "200 images in 1 shard(s), 10 classes, from class folders" in output
    return place / "data"


def test_a_job_that_is_stopped_says_so_and_goes_on_as_another_job(nodes, dataset, place, clean):
    runs = place / "runs"
    (clean / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = ["python", "-m", "pipelines.pretrain", "--storage", str(runs)]
    given = ["--config", "run.yaml", "--data", str(dataset), "--name", "digits"]
    job = nodes.submit("first", *command, *given, cwd=clean, options=("--working-dir", "."))
    kept = (runs / "digits").glob
    wait_for(lambda: list(kept("step-*/state.pt")) or job.poll() is not None, "a checkpoint", seconds=JOB_SECONDS)
    assert job.poll() is None, nodes.log("first")
    assert nodes.train_workers() == [1, 1]
    nodes.stop("first", cwd=clean)
    output = ended(job)
    assert nodes.about("first")["status"] == "STOPPED"
    assert "terminated gracefully with SIGTERM" in nodes.ending("first")
    assert f"run digits: stopped; go on with --resume digits --storage {runs}" in nodes.log("first")
    client = MlflowClient(nodes.environment["MLFLOW_TRACKING_URI"])
    record = json.loads((runs / "digits" / "run.json").read_text())
    assert record["status"] == "stopped"
    assert client.get_run(record["run_id"]).info.status == "KILLED"

    job = nodes.submit("second", *command, "--resume", "digits", cwd=clean)
    output = ended(job)
    assert job.returncode == 0, output
    assert nodes.about("second")["status"] == "SUCCEEDED"
    assert "going on from step" in output
    assert not NOISE.findall(nodes.log("first") + nodes.log("second"))
    assert json.loads((runs / "digits" / "run.json").read_text())["status"] == "finished"
    run = client.get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(record["run_id"], "train/loss")]
    assert sorted(steps) == list(range(1, 49))

    sets = ("--data", str(dataset), "--test", str(dataset))
    small = ("--evaluation.knn.k", "5", "--evaluation.probe", "null")
    words = ("python", "-m", "pipelines.evaluate", "--encoder", "models:/jobs/1")
    job = nodes.submit("evaluate", *words, *sets, *small, cwd=clean)
    output = ended(job)
    assert job.returncode == 0, output
    assert "kNN" in output


def test_bad_input_fails_the_job_with_one_line(nodes, clean):
    job = nodes.submit("bad", "python", "-m", "pipelines.pretrain", "--data", "/no/such/data", cwd=clean)
    ended(job)
    assert job.returncode == 1, "`ray job submit` knows no other"
    about = nodes.about("bad")
    assert about["status"] == "FAILED"
    assert about["driver_exit_code"] == 2
    said = 'jem pretrain: no data at /no/such/data: give a folder of Parquet shards, or make one with "jem ingest"'
    assert about["message"].splitlines()[-1] == said
    assert nodes.log("bad").splitlines()[-1] == said
