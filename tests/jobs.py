"""Every job on a cluster of three nodes, as a user sends it: what it took, how it ended, and what was left behind.

    python -m tests.jobs [--s3] [--folder DIR]

It starts a Ray head without work, two worker nodes of two CPUs and MLflow's server, each with processes of its own, on
this machine, and submits from an empty folder with `ray job submit`: ingest, pretrain on both nodes (once stopped, and
then resumed by another job), tune, evaluate, embed, and jobs with bad input. With --s3 pictures, data set, checkpoints
and MLflow's files are in an object store (moto's), and the disk that the nodes share holds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from pyarrow import fs
from sklearn.datasets import load_digits

from tests.cluster import BUCKET, Nodes, mlflow_server, object_store, ray_nodes, wait_for, write_images

JOB_SECONDS = 600.0
TRAIN, TEST = 1200, 400
SETTINGS: dict[str, Any] = {
    "stream": {"canvas": 32, "window": 1},
    "augment": {
        "views": [{"count": 2, "size": 32, "scale": [0.4, 1.0], "flip": 0.0}],
        "mean": [0.3, 0.3, 0.3],
        "std": [0.35, 0.35, 0.35],
    },
    "backbone": {"name": "vit_tiny", "patch": 8},
    "method": {"name": "vicreg", "expander": [128, 128]},
    "optimizer": {"name": "adamw", "lr": 0.004},
    "schedule": {"warmup_epochs": 1},
    "train": {"epochs": 6, "batch_size": 100, "log_every": 2, "checkpoint_every": 10, "keep_checkpoints": 2},
    # one worker to a node of 2 CPUs
    "cluster": {"workers": 2, "cpus_per_worker": 1.5},
    "evaluation": {"knn": {"k": 10}, "online": {"every": 3, "bank": 500, "queries": 100}, "random_baseline": False},
    "track": {"experiment": "jobs", "register_as": "digits"},
}
SEARCH = {
    "train": {"epochs": 2, "batch_size": 100, "log_every": 2},
    "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    "evaluation": {"knn": {"k": 10}, "online": {"every": 1, "bank": 500, "queries": 100}, "random_baseline": False},
    "search": {"over": ["weights"], "trials": 3, "concurrent": 2},
    "track": {"experiment": "jobs", "register_as": "digits-tuned"},
}


@dataclass
class Seen:
    """What was seen of a job."""

    name: str
    seconds: float
    submitted: int
    """Exit status of `ray job submit`."""
    status: str
    """Ray's."""
    driver: int | None
    """Exit status of the driver."""
    lines: int
    odd: list[str]
    """Lines of its log that jem did not mean for the user."""
    said: str
    """Its last line."""
    workers: list[int]
    """Train workers on each worker node."""
    as_wanted: bool


RAYS = re.compile(r"Runtime env is setting up|ray/issues/53727")
"""Two lines of Ray's own: its first, and one of each actor pool, which only another log level would silence; that
is announced with a line too."""
NOISE = re.compile(r"\r|\(pid=|\(raylet|Traceback|\*\*\*|🏃|^\[?\d{4}-\d\d-\d\d|WARNING|Warning|^E\d{4}|\x1b")


class Session:
    """Submits jobs to a cluster, and keeps what was seen of them."""

    def __init__(self, nodes: Nodes, clean: Path, place: str, client: MlflowClient) -> None:
        self.nodes, self.clean, self.place, self.client = nodes, clean, place, client
        self.seen: list[Seen] = []

    def run(
        self,
        name: str,
        *command: str,
        options: tuple[str, ...] = (),
        wanted: tuple[str, int | None] = ("SUCCEEDED", 0),
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Submit a job and wait for its end, which should be `wanted`; `stop` says when to stop it."""
        began = time.monotonic()
        job = self.nodes.submit(name, "python", "-m", *command, cwd=self.clean, options=options)
        workers = [0, 0]
        stopping = 0.0

        def over() -> bool:
            nonlocal workers, stopping
            workers = max(workers, self.nodes.train_workers(), key=sum)
            if stop is not None and not stopping and stop():
                stopping = time.monotonic()
                self.nodes.stop(name, self.clean)
            return job.poll() is not None

        # its output is not more than a pipe holds
        wait_for(over, f"the end of {name}", seconds=JOB_SECONDS)
        about, log = self.nodes.about(name), self.nodes.log(name)
        lines = log.splitlines()
        odd = [line for line in log.split("\n") if NOISE.search(line) and not RAYS.search(line)]
        seen = Seen(
            name, time.monotonic() - began, job.returncode, about["status"], about.get("driver_exit_code"), len(lines),
            odd, lines[-1], workers, as_wanted=not odd and (about["status"], about.get("driver_exit_code")) == wanted,
        )  # fmt: skip
        self.seen.append(seen)
        print(f"--- {name}: ray job submit -- python -m {' '.join(command)}\n{log.rstrip()}\n", flush=True)

    def jobs(self) -> None:
        """All of them, one after the other."""
        place, client = self.place, self.client
        for part in ("train", "test"):
            self.run(f"ingest-{part}", "pipelines.ingest", f"{place}/pictures/{part}", f"{place}/{part}")
        (self.clean / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
        (self.clean / "search.yaml").write_text(yaml.safe_dump(SETTINGS | SEARCH))
        data = ("--data", f"{place}/train", "--test", f"{place}/test")
        storage = ("--storage", f"{place}/runs")
        sent = ("--working-dir", ".")
        new = ("pipelines.pretrain", "--config", "run.yaml", *data, *storage, "--name", "digits")
        self.run("pretrain", *new, options=sent, wanted=("STOPPED", None), stop=self.has_checkpoint)
        run_id = self.record()["run_id"]
        print(self.nodes.ending("pretrain"))
        print(f"after the stop: folder {self.record()['status']}, MLflow {client.get_run(run_id).info.status}\n")
        self.run("name-taken", *new, options=sent, wanted=("FAILED", 2))
        self.run("resume", "pipelines.pretrain", "--resume", "digits", *storage)
        print(f"after the resume: folder {self.record()['status']}, MLflow {client.get_run(run_id).info.status}")
        steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
        once = steps == sorted(set(steps))
        print(f"curve of train/loss: {len(steps)} points, steps {steps[0]} to {steps[-1]}, none twice: {once}\n")
        search = ("pipelines.tune", "--config", "search.yaml", *data, *storage, "--name", "search")
        self.run("tune", *search, options=sent)
        encoder = ("--encoder", "models:/digits/1")
        self.run("evaluate", "pipelines.evaluate", *encoder, *data, "--evaluation.knn.k", "10")
        self.run("embed", "pipelines.embed", *encoder, "--data", f"{place}/test", "--out", f"{place}/embedded")
        self.run("no-data", "pipelines.pretrain", "--data", f"{place}/nosuch", wanted=("FAILED", 2))
        misspelt = ("--data", f"{place}/train", "--trian.epochs", "3")
        self.run("no-option", "pipelines.pretrain", *misspelt, wanted=("FAILED", 2))

    def record(self) -> dict[str, Any]:
        """What the run's folder says of the pretraining."""
        filesystem, path = fs.FileSystem.from_uri(f"{self.place}/runs/digits/run.json")
        with filesystem.open_input_stream(path) as stream:
            content: dict[str, Any] = json.loads(stream.read())
            return content

    def has_checkpoint(self) -> bool:
        """Whether the pretraining has left one."""
        filesystem, path = fs.FileSystem.from_uri(f"{self.place}/runs/digits")
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return any(info.base_name == "state.pt" for info in found)

    def tell_tracking(self) -> None:
        """What is in MLflow."""
        client = self.client
        experiment = client.get_experiment_by_name("jobs")
        assert experiment is not None
        for run in reversed(client.search_runs([experiment.experiment_id], max_results=100)):
            kind = "  child" if "mlflow.parentRunId" in run.data.tags else "run"
            files = sorted(item.path for item in client.list_artifacts(run.info.run_id))
            print(f"{kind} {run.info.run_name}: {run.info.status}; {', '.join(files)}")
        for model in client.search_registered_models():
            versions = sorted(int(each.version) for each in client.search_model_versions(f"name='{model.name}'"))
            print(f"registered {model.name}: versions {versions}, aliases {model.aliases}")

    def tell_storage(self) -> None:
        """How much each folder of the place holds."""
        filesystem, path = fs.FileSystem.from_uri(self.place)
        for folder in filesystem.get_file_info(fs.FileSelector(path)):
            infos = filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
            sizes = [info.size or 0 for info in infos if info.is_file]
            print(f"{self.place}/{folder.base_name}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB")

    def table(self) -> str:
        """One row for each job."""
        titles = ("job", "seconds", "submit", "Ray", "driver", "workers per node", "lines", "odd lines", "last line")
        head = f"| {' | '.join(titles)} |"
        rows = [
            f"| {s.name} | {s.seconds:.0f} | {s.submitted} | {s.status} | {'-' if s.driver is None else s.driver} | "
            f"{s.workers} | {s.lines} | {len(s.odd)} | {s.said} |"
            for s in self.seen
        ]
        odd = [f"odd, in {seen.name}: {line!r}" for seen in self.seen for line in seen.odd]
        return "\n".join([head, "|" + " --- |" * len(titles), *rows, *odd])


def run_all(folder: Path, *, s3: bool) -> bool:
    """Start everything, run all jobs and print what was seen; whether all was as it should be."""
    with ExitStack() as stack:
        store = stack.enter_context(object_store(folder / "s3")) if s3 else {}
        os.environ.update(store)
        place = f"s3://{BUCKET}" if s3 else str(folder / "shared")
        write_sources(folder / "pictures", f"{place}/pictures")
        uri = stack.enter_context(mlflow_server(folder / "mlflow", f"{place}/mlflow", store))
        nodes = stack.enter_context(ray_nodes(2, 2, store | {"MLFLOW_TRACKING_URI": uri}))
        session = Session(nodes, folder / "clean", place, MlflowClient(uri))
        session.clean.mkdir()
        session.jobs()
        print(session.table())
        session.tell_tracking()
        session.tell_storage()
        if s3:
            kinds = {".parquet", ".pt", ".safetensors", ".png"}
            left = [path for path in folder.rglob("*") if path.suffix in kinds]
            print(f"on the disk: {len(left)} data, checkpoint, encoder or picture files")
    return all(seen.as_wanted for seen in session.seen)


def write_sources(scratch: Path, place: str) -> None:
    """Put class folders of digits where the jobs find them; nothing stays in `scratch`."""
    digits = load_digits()
    write_images(scratch / "train", digits.images[:TRAIN], digits.target[:TRAIN])
    write_images(scratch / "test", digits.images[TRAIN : TRAIN + TEST], digits.target[TRAIN : TRAIN + TEST])
    filesystem, path = fs.FileSystem.from_uri(place)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(str(scratch), path, destination_filesystem=filesystem)
    shutil.rmtree(scratch)


def main() -> int:
    """Read the options, run, and say by the exit status whether all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s3", action="store_true", help="keep everything in an object store")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder, removed in the end")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jem-jobs-", dir=options.folder))
    try:
        return 0 if run_all(folder, s3=options.s3) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
