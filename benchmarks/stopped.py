"""What is left over of trainings that a search stopped early: placement groups, processes, CPUs.

One trial trains nothing and is ahead; the others are real trainings of 400 epochs, whose figures are behind from the
first epoch on, so that ASHA stops each.

    python benchmarks/stopped.py --trials 10
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.util

from jem.config import ClusterConfig, PretrainConfig, SearchConfig
from jem.search.launch import run_trials
from jem.search.trials import Epoch, Trial
from jem.tracking.runs import Tracker
from pipelines.cluster import TRIAL_CPUS, connect, place
from pipelines.pretrain import open_data
from pipelines.settings import load_config
from pipelines.trials import Work

DEADLINE = 60.0
KEPT = ("ray::IDLE", "ray::_AutoscalingCoordinatorActor")
"""What Ray keeps for the next one: idle processes, and one coordinator for the whole cluster."""


class Counts:
    """A book that only counts."""

    def __init__(self, trials: int, before: dict[int, str]) -> None:
        self.before = before
        self.waiting = [Trial(number, {}) for number in range(trials + 1)]
        self.statuses: list[str] = []

    def next(self) -> Trial | None:
        return self.waiting.pop(0) if self.waiting else None

    def epoch(self, number: int, epoch: Epoch) -> None:
        pass

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        self.statuses.append(outcome["status"])
        print(f"trial {number}: {outcome['status']}; now {report(self.before)}", flush=True)

    def stopped(self) -> None:
        pass


def placement_groups() -> int:
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def processes() -> dict[int, str]:
    """The names of this process's descendants, without what Ray keeps."""
    names = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline()).split(" ")[0]
            if name and not name.startswith(KEPT):
                names[process.pid] = name
    return names


def report(ours: dict[int, str]) -> str:
    here = {pid: name for pid, name in processes().items() if pid not in ours}
    return f"{placement_groups()} placement groups, {len(here)} processes {sorted(here.values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(Path(__file__).parent / "../../shared/data/cifar10/train"))
    parser.add_argument("--trials", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, connect(ClusterConfig(), dashboard=True) as cluster:
        small = [
            "--limit",
            "256",
            "--train.batch_size",
            "128",
            "--train.epochs",
            "400",
            "--evaluation.online.bank",
            "200",
        ]
        one = ["--cluster.workers", "1", "--storage", storage, "--track.uri", f"sqlite:///{storage}/mlflow.db"]
        config = load_config(PretrainConfig, ["--recipe", "vicreg-cifar10-cpu", "--data", options.data, *small, *one])
        tracker = Tracker(config.track)
        placement = place(config.cluster, config.stream, cluster, trials=2)
        real = Work(config, open_data(config), storage, placement, None, tracker.uri, "knn", 0.5)

        def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
            if trial.number == 0:
                told(Epoch(1, 1.0, 0), True)
                return {}, 1.0, ""
            return real(trial, lambda epoch, last: told(replace(epoch, value=-float(trial.number)), last), stop)

        before = processes()
        print(f"before: {report(before)}", flush=True)
        book = Counts(options.trials, before)
        search = SearchConfig()
        run_trials(
            book,
            work,
            search,
            left=options.trials + 1,
            concurrent=2,
            epochs=400,
            over=[],
            cpus=TRIAL_CPUS,
            max_failures=0,
        )
        end = time.monotonic() + DEADLINE
        while processes().keys() - before.keys() and time.monotonic() < end:
            time.sleep(0.5)
        print(f"{book.statuses.count('pruned')} trials stopped early; left over: {report(before)}")
        free, whole = ray.available_resources()["CPU"], ray.cluster_resources()["CPU"]
        print(f"free: {free:g} of {whole:g} CPUs")


if __name__ == "__main__":
    main()
