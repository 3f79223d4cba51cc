"""A search on Ray: killed half-way and resumed, and what is left over of trials that were stopped early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

import jem
from jem.config import PretrainConfig, SearchConfig, TuneConfig
from jem.data.index import open_index
from jem.data.read import read_rows
from jem.errors import InputError, RunError
from jem.search.launch import run_trials
from jem.search.trials import Epoch, Trial
from pipelines.cluster import TRIAL_CPUS, Placement
from pipelines.pretrain import open_data
from pipelines.settings import dump_config, load_config
from pipelines.trials import Work
from pipelines.tune import TuneResult, tune

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
DEADLINE = 240.0
TRIALS = 3
STOPPED = 2
OURS = ("RayTrainWorker", "TrainController", "_TrialActor", "Mailbox", "MapBatches", "MapWorker")
"""What a trial starts, by the names that Ray gives its processes."""


def config_of(data: Path, test: Path, storage: Path, name: str, **search: Any) -> TuneConfig:
    return TuneConfig.model_validate(
        {
            "data": str(data),
            "test": str(test),
            "limit": 128,
            "name": name,
            "storage": str(storage),
            "stream": {"canvas": 32, "window": 1},
            "augment": {"views": [{"count": 2, "size": 32, "scale": (0.4, 1.0), "flip": 0.0}]},
            "backbone": {"name": "timm:test_resnet"},  # a small network
            "method": {"name": "vicreg", "expander": (64, 64)},
            "optimizer": {"name": "adamw", "lr": 0.004},
            "schedule": {"warmup_epochs": 0.5},
            "train": {"epochs": 3, "batch_size": 64, "log_every": 1},
            "cluster": {"workers": 1, "cpus_per_worker": 0.2},
            "evaluation": {"knn": {"k": 5}, "online": {"bank": 60, "queries": 30}, "random_baseline": False},
            "track": {"experiment": "searches", "register_as": name},
            "search": {"over": ["weights"], "trials": TRIALS, "concurrent": 2, "early_stop": "none", **search},
        }
    )


def record(storage: Path, name: str, number: int) -> dict[str, Any]:
    path = storage / name / f"trial-{number:03d}" / "run.json"
    return json.loads(path.read_text()) if path.exists() else {"status": "none"}


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def resumed(ray_cluster, digits_dataset, digits_test, storage, tmp_path_factory) -> tuple[TuneResult, dict[str, Any]]:
    """A search whose driver was killed in mid-trial, and then resumed; and the record of what was finished by then."""
    folder = tmp_path_factory.mktemp("driver")
    file = folder / "config.yaml"
    file.write_text(dump_config(config_of(digits_dataset, digits_test, storage, "killed")))
    repository = Path(__file__).resolve().parents[2]
    paths = [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.tune", "--config", str(file)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip

        def half_way() -> bool:
            ended = [record(storage, "killed", number)["status"] == "finished" for number in range(TRIALS)]
            running = [number for number in range(TRIALS) if record(storage, "killed", number)["status"] == "running"]
            return sum(ended) >= 1 and len(running) >= 1

        assert within(DEADLINE, lambda: half_way() or driver.poll() is not None)
        driver.kill()
        assert driver.wait(DEADLINE) == -signal.SIGKILL, (folder / "log").read_text()
    before = {number: record(storage, "killed", number) for number in range(TRIALS)}
    return tune(TuneConfig(resume="killed", storage=str(storage))), before


def test_a_killed_search_ends_with_the_planned_trials_none_lost_and_none_twice(resumed, storage):
    result, before = resumed
    assert [trial.number for trial in result.trials] == list(range(TRIALS))
    finished = [number for number, each in before.items() if each["status"] == "finished"]
    assert 1 <= len(finished) < TRIALS, "it was killed half-way"
    for number in finished:
        assert record(storage, "killed", number) == before[number], "what was finished is as it was"
    for number, each in before.items():
        if each["status"] != "none":
            assert result.trials[number].settings == each["settings"]
            assert result.trials[number].run_id == each["run_id"]
    assert {path.name for path in (storage / "killed").glob("trial-*")} == {f"trial-{n:03d}" for n in range(TRIALS)}


def test_every_trial_has_one_run_below_the_search_s_and_its_own_curves(resumed):
    result, before = resumed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'")
    assert sorted(run.data.tags["jem.name"] for run in runs) == [trial.name for trial in result.trials]
    everyone = client.search_runs([parent.info.experiment_id], "tags.`jem.job` = 'tune'")
    assert [run.info.run_id for run in everyone] == [result.run_id], "one parent, however often it was started"
    for run in runs:
        trial = next(trial for trial in result.trials if trial.run_id == run.info.run_id)
        assert run.data.tags["jem.trial"] == trial.status
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == sorted(set(steps)), "no step twice"
        if trial.status == "finished":
            assert run.info.status == "FINISHED"
            assert run.data.metrics["objective"] == trial.objective == trial.figures["knn"]
            assert steps == list(range(1, 7))
            known = [epoch.epoch for epoch in trial.epochs]
            assert known[:2] == [1, 2]
            # the last may be lost where the driver was killed between its training and its judgement
            assert known[2:] == [3] or before[trial.number]["status"] == "running"


def test_the_best_alone_is_registered_and_its_recipe_starts_it_again(resumed, storage, digits_dataset, digits_test):
    result, _ = resumed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    done = [trial for trial in result.trials if trial.status == "finished"]
    assert result.best.objective == max(trial.objective for trial in done)
    (version,) = client.search_model_versions("name = 'killed'")
    assert version.run_id == result.best.run_id
    assert result.pretrained.pretrained["knn"] == pytest.approx(result.best.objective, abs=0.02)
    batch = read_rows(open_index(str(digits_test)), range(3), 32, 10**6)
    assert jem.load_encoder(result.pretrained.encoder)(batch.image).shape == (3, 96)

    again = load_config(PretrainConfig, ["--config", result.recipe])
    assert again.name is None
    assert again.method.mu == result.best.settings["method.mu"]
    ours = config_of(digits_dataset, digits_test, storage, "killed").base()
    settings = {key.removeprefix("method."): value for key, value in result.best.settings.items()}
    assert again == ours.model_copy(update={"method": ours.method.model_copy(update=settings)})


def test_pictures_are_in_the_folder_and_in_mlflow(resumed, storage):
    result, _ = resumed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    logged = {item.path for item in client.list_artifacts(result.run_id)}
    for name in ("parallel.png", "importance.png"):
        assert name in logged
        assert (storage / "killed" / name).read_bytes().startswith(b"\x89PNG")
    assert {"best.yaml", "config.yaml"} <= logged
    assert sum(result.importances.values()) == pytest.approx(1)


def test_a_finished_search_is_not_begun_again_and_keeps_its_settings(resumed, storage):
    with pytest.raises(InputError, match="search killed is finished: to go on, give it more than 3"):
        tune(TuneConfig(resume="killed", storage=str(storage)))
    with pytest.raises(InputError, match="has a run killed already: go on with it"):
        tune(config_of(Path("x"), Path("x"), storage, "killed"))
    other = {"resume": "killed", "storage": str(storage), "search": {"over": ["rates"]}}
    with pytest.raises(InputError, match=r"keeps its settings: leave out --search\.over"):
        tune(TuneConfig.model_validate(other))
    with pytest.raises(InputError, match="has 3 trials already"):
        tune(TuneConfig.model_validate({"resume": "killed", "storage": str(storage), "search": {"trials": 2}}))


def test_what_the_cluster_cannot_hold_is_refused_before_anything_is_written(
    ray_cluster, digits_dataset, digits_test, tmp_path
):
    config = config_of(digits_dataset, digits_test, tmp_path, "large", concurrent=30, trials=30)
    with pytest.raises(InputError, match=r"30 workers x 0\.2 CPUs.*lower search\.concurrent"):
        tune(config)
    assert list(tmp_path.iterdir()) == []


class Behind:
    """A book of one trial that is the best, and others that are behind from the first epoch on."""

    def __init__(self) -> None:
        self.waiting = [Trial(number, {}) for number in range(STOPPED + 1)]
        self.outcomes: dict[int, str] = {}

    def next(self) -> Trial | None:
        return self.waiting.pop(0) if self.waiting else None

    def epoch(self, number: int, epoch: Epoch) -> None:
        """What is noted does not matter here."""

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        self.outcomes[number] = outcome["status"]

    def stopped(self) -> None:
        """Nobody interrupts it."""


def test_of_trials_that_asha_stopped_no_placement_group_and_no_process_is_left(
    ray_cluster, digits_dataset, digits_test, tmp_path
):
    import ray

    base = config_of(digits_dataset, digits_test, tmp_path, "leftovers").base()
    base = base.model_copy(
        update={
            "cluster": base.cluster.model_copy(update={"workers": 2}),
            "train": base.train.model_copy(update={"epochs": 400}),
        }
    )
    uri = os.environ["MLFLOW_TRACKING_URI"]
    real = Work(base, open_data(base), str(tmp_path), Placement(gpu=False, decode_tasks=1), None, uri, "knn", 0.5)

    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        if trial.number == 0:  # nothing is trained: it only is ahead
            told(Epoch(1, 1.0, 0), True)
            return {}, 1.0, ""
        # a real training of 400 epochs, which goes on until it is stopped
        return real(trial, lambda epoch, last: told(replace(epoch, value=-float(trial.number)), last), stop)

    def groups() -> set[str]:
        table = ray.util.placement_group_table()
        return {key for key, group in table.items() if group["state"] != "REMOVED"}

    def ours() -> set[int]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            try:
                if any(name in " ".join(process.cmdline()) for name in OURS):
                    found.add(process.pid)
            except psutil.Error:
                continue
        return found

    before_groups, before = groups(), ours()
    book = Behind()
    run_trials(
        book, work, SearchConfig(), left=STOPPED + 1, concurrent=2, epochs=400, over=[], cpus=TRIAL_CPUS, max_failures=0
    )  # fmt: skip
    assert book.outcomes == {0: "finished", **dict.fromkeys(range(1, STOPPED + 1), "pruned")}
    assert groups() - before_groups == set()
    assert within(30, lambda: not ours() - before), [psutil.Process(pid).cmdline() for pid in ours() - before]
    assert within(30, lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_a_search_without_a_trial_that_ended_well_says_so(ray_cluster, digits_dataset, digits_test, tmp_path):
    search = {"over": [], "space": {"train.batch_size": {"choice": [256]}}, "trials": 2}
    with pytest.raises(RunError, match=r"no trial finished: 2 failed \(trial 0: .*do not fill one batch"):
        tune(config_of(digits_dataset, digits_test, tmp_path, "hopeless", **search))
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("searches").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`jem.name` = 'hopeless'")
    assert parent.info.status == "FAILED"
    assert yaml.safe_load((tmp_path / "hopeless" / "run.json").read_text())["status"] == "failed"
